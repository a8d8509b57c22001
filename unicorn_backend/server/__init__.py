"""An OpenAI-compatible server around one `Engine`.

`protocol` checks what comes in and shapes what goes out, `worker` runs the requests, several at a time, `metrics`
counts, `app` has the routes.

Why not transformers' own server underneath: it loads models itself, calls plain `generate` without a compiled
model, and has no limits, keys, log probabilities or reuse of the KV cache between requests. Its continuous batching
copies, on a CPU, all keys and values out of their pages for every layer and token; ours is `generation/batch.py`. Of
it we use the parsing of tool calls.
"""
