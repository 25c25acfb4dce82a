"""Continuous batching over a paged KV pool: sequence, scheduler, runner, sampler, engine. Tokens in, tokens out."""
