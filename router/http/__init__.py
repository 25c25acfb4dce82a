"""The OpenAI-compatible front: HTTP in, `Request` to the dispatcher, text out."""
