"""Context templates: texts that a prompt is put after."""

from collections.abc import Sequence

import torch

from kedit.model.lm import LM

# Context templates ---------------------------------------------------------------------------------

_SEEDS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def context_templates(lm: LM, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[str]:
    """The bare ``{}`` and sampled prefixes: for each (tokens, count), that many ``"<text>. {}"``.

    Texts are sampled from the model itself (top-5) from fixed first words; a length includes the
    first word. Seeded, so the same model gives the same templates (ROME and MEMIT, appendix on
    hyper-parameters).
    """
    generator = torch.Generator().manual_seed(seed)
    templates = ["{}"]
    for tokens, count in lengths:
        for index in range(count):
            ids = [*lm.begin, *lm.encode(_SEEDS[index % len(_SEEDS)])]
            end = len(lm.begin) + tokens
            while len(ids) < end:
                logits = lm.model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0, -1]
                top = logits.float().topk(5)
                pick = torch.multinomial(top.values.softmax(-1).cpu(), 1, generator=generator)
                ids.append(int(top.indices[pick]))
            text = lm.tokenizer.decode(ids[len(lm.begin) :], skip_special_tokens=True)
            templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return templates
