"""transformers with a decoder's weights, to be measured beside it."""

from __future__ import annotations


def twin(decoder):
    """transformers' model of the decoder's architecture and dtype, with its values in memory of its own, as from_pretrained
    would have them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from research.core.spec import spec_to_hf

    config = AutoConfig.for_model(**spec_to_hf(decoder.spec))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=decoder.lm_head.weight.dtype)
    model.load_state_dict({k: v.clone() for k, v in decoder.state_dict().items()}, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies were made on the meta device, too
    return model.eval()


def exactly(new: int, cache: str = "static"):
    """Greedy settings for ``new`` tokens, no more and no less; ``cache``: static or dynamic."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        disable_compile=True,
    )
