"""What the expert is for: sources, packs, templates, tokens, and the split into calibration and held-out.

``load_expert`` reads an ``EXPERT.yaml``; ``build_corpora`` turns it into tokens for a model. Nothing heavy is
imported before a function needs it.
"""

from cusprun.corpus.build import build_corpora, corpus_hash, read_documents
from cusprun.corpus.expert import load_expert
from cusprun.corpus.packs import pack_names, read_pack
from cusprun.corpus.sources import read_source
from cusprun.corpus.tokens import load_tokenizer, tokenize

__all__ = [
    "build_corpora",
    "corpus_hash",
    "load_expert",
    "load_tokenizer",
    "pack_names",
    "read_documents",
    "read_pack",
    "read_source",
    "tokenize",
]
