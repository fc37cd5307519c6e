"""The same weights in two libraries: our `Qwen` and transformers' model over one storage."""

from typing import Any

import torch

from qwenlib.model import Qwen, QwenConfig


def draw(config: QwenConfig, seed: int, device: torch.device, dtype: torch.dtype) -> Qwen:
    """A model with every parameter drawn: no bias is zero and no gain one, or errors could hide.

    Matrices ~ N(0, 1 / columns), biases ~ N(0, 0.5^2), gains ~ U(0.5, 1.5).
    """
    model = Qwen(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(device, dtype).eval()


def transformers_twin(model: Qwen) -> Any:
    """transformers' model on the tensors of ours, with its fused attention ("sdpa")."""
    import transformers

    transformers.logging.set_verbosity_error()
    values = model.config.to_hf()
    kind = values.pop("model_type")
    values = {key: value for key, value in values.items() if key != "architectures"}
    config_class, model_class = {
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    }[kind]
    config = getattr(transformers, config_class)(**values)
    # A tensor in the library's usual order is shared, one in another order is copied into it.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weight = weights["lm_head.weight"]
    with torch.device("meta"):
        twin = getattr(transformers, model_class)._from_config(
            config, attn_implementation="sdpa", dtype=weight.dtype
        )
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    # Rotary frequencies are no weights: they were left on the meta device.
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(weight.device)
    # End and padding ids are the caller's: no length may depend on what a model happens to say.
    twin.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return twin.requires_grad_(True).train(model.training)


def weight_bytes(model: Qwen) -> int:
    """Bytes of the weights that one decoding step reads: all but an untied input embedding."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.config.tie_word_embeddings:
        return total
    embedding = model.model.embed_tokens.weight
    return total - embedding.numel() * embedding.element_size()
