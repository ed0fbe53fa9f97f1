"""HTTP over the engine: OpenAI's and TGI's endpoints, metrics, and the chat page.

A request passes through these files in this order: :mod:`gate` (key, rate, size), a file of endpoints (:mod:`chat`,
:mod:`completions`, :mod:`embeddings`, :mod:`tgi`) that makes :mod:`engine requests <research.core.engine.api>` of its
fields, :mod:`service` (room for it, and what is counted), :mod:`driver` (the engine's thread) and back.
"""
