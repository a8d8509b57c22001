"""An OpenAI-compatible server around one `Engine`.

`protocol` checks what comes in and shapes what goes out, `worker` runs the requests one after another, `metrics`
counts, `app` has the routes.

Why not transformers' own server underneath: it loads models itself, calls plain `generate` without a compiled
model, and has no limits, keys, log probabilities or reuse of the KV cache between requests; its continuous batching
needs paged attention, which our graphs replace. Of it we use the parsing of tool calls.
"""
