"""A page that asks two servers the same and shows both answers as they come."""
