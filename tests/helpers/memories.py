"Toy memories, and the traces that they may not leave"

import hashlib, torch
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.temp_lora.generation import TempLoRA


def digest(tensors):
    return hashlib.sha256(
        b''.join(w.detach().contiguous().view(torch.uint8).numpy().tobytes() for w in tensors)
    ).hexdigest()


def traces(model):
    """All of a model that an accident could change

    Bits, flags, gradients, modes, attributes (forward functions among them), hooks; and the global generator.
    """
    hooks = lambda m: [
        len(d) for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    ]
    modules = [
        (p, sorted(m.__dict__), id(m.__dict__.get('forward')), m.training, hooks(m)) for p, m in model.named_modules()
    ]
    return (
        digest(model.parameters()),
        modules,
        [(n, w.requires_grad, w.grad is None) for n, w in model.named_parameters()],
        torch.get_rng_state().tolist(),
    )


STILL = TempLoRA(chunk=8, window=32, context=8, train_context=8, r=4, alpha=4.0, lr=0.0)

PROMPT = torch.randint(3, 97, (90,), generator=generator(2))


def plain_model():
    model = toy_model()
    model.generation_config.eos_token_id = None
    return model


MODEL = plain_model()


def write(s, n=40, t=21, model=MODEL, **options):
    options, more = {k: v for k, v in options.items() if k != 'do_sample'}, dict(
        do_sample=options.get('do_sample', False)
    )
    ids = PROMPT[None, :t]
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=Decoder(memory=s, **options),
        max_new_tokens=n,
        pad_token_id=0,
        **more
    )[0]
