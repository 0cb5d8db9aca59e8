"""Evaluation on BEIR-format data: reading, first stage, reranking runs, metrics."""
