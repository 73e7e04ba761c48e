"""Write docs/architectures.md: which architectures can be steered (TESTED in llama-steer-facts.cpp), and why others cannot.

python scripts/architectures.py            write it
python scripts/architectures.py --check    say whether it is up to date; exit code 1 if not
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "cpp_patch" / "llama-steer-facts.cpp"
PAGE = ROOT / "docs" / "architectures.md"

# Of llama.cpp as vendored by llama-cpp-python 0.3.36.
REFUSED = {
    "bert, nomic-bert, nomic-bert-moe, jina-bert-v2, jina-bert-v3": "encoders, which write no text; no hook",
    "modern-bert, neo-bert, eurobert": "encoders, which write no text; no hook",
    "llama-embed, gemma-embedding, t5encoder": "encoders, which write no text",
    "t5": "an encoder and a decoder; not tried",
    "clip, wavtokenizer-dec": "for images and sound; no text model",
    "eagle3, dflash, gemma4-assistant": "drafts: the main model is steered",
    "gemma3n": "its hidden state has four parallel forms, which no hook knows yet",
    "nemotron_h, nemotron_h_moe": "llama.cpp gives the control vector the feed-forward network's output only, not the block's",
    "plamo2, hy_v4, qwen4exp, deepseek2-ocr": "llama.cpp gives their blocks no control vector, and no hook of ours is there yet",
    "mpt": "an edit of the tiny model's first layer does not reach its logits; not understood yet",
    "kimi-linear, minimax-01, plm, rwkv6qwen2": "no tiny model that llama.cpp computes could be made yet",
    "chameleon, qwen3tts, graniteswitch": "no tiny model that llama.cpp computes could be made yet",
    "gptj": "llama.cpp has the name only",
}

TEXT = """\
# Architectures

Made by `scripts/architectures.py`.

{count} architectures of llama.cpp can be steered.
Each passes the same exact tests on a tiny random model ([how](testing.md)).
Edits and reads at the first, middle and last layer are compared with numpy, with batches cut into small ones.
A second sequence in the same batch must not change by a bit.
`steer doctor --json` lists them under `architectures`.

What else has to be known of an architecture is found out from its graph when a model is opened, in any version of llama.cpp:
which axis counts tokens, how many streams a layer has, where only output tokens are left.
A name that is not in the list is refused, because nobody has tried it.

{names}

`attn_out` and `ffn_out` exist for deepseek4.
Recurrent and hybrid models (Mamba, RWKV, Jamba, Falcon-H1, Granite hybrid, LFM2, Kimi K3) are steered as all others.
It is the state that leaves a block which is edited, not their recurrent memory.
Diffusion models (dream, llada, llada-moe, rnd1) attend to a whole batch at once; they are steered in the library only.
The tiny models of these have a generator and further tests of their own: {own}.

## Refused

| architecture | why |
|---|---|
{refused}
"""


def page() -> str:
    """The page, in Markdown."""
    table = re.search(r"TESTED\[\] = \{(.*?)\};", FACTS.read_text(encoding="utf-8"), re.DOTALL)
    assert table is not None
    names = re.findall(r'"([^"]+)"', table.group(1))
    sys.path.insert(0, str(ROOT / "src"))
    from steer_plugins.testing import ARCHITECTURES

    both = {name for group in REFUSED for name in group.split(", ")} & set(names)
    assert not both, f"tested and refused: {both}"
    return TEXT.format(
        count=len(names),
        names=", ".join(f"`{name}`" for name in names) + ".",
        own=", ".join(sorted(ARCHITECTURES)),
        refused="\n".join(f"| {name} | {why} |" for name, why in REFUSED.items()),
    )


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != page():
            print(f"{PAGE.name} is out of date: run scripts/architectures.py", file=sys.stderr)
            sys.exit(1)
    else:
        PAGE.write_text(page(), encoding="utf-8")
