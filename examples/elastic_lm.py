"""One character LM, trained once, served at four budgets: nats and tokens a second in one table.

Trains with the default policy (half of each batch, two updates in four, at a ratio that moves), then skips the zeros.
The model reads 16 letters and tells the next one, so that each token is a chain of wide layers at batch 1.
"""

import argparse
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn

import regimewrap

CONTEXT, HIDDEN = 16, 2048


def character_lm(letters):
    """Return a model from letters, shape (batch, 16), to logits of the next one, shape (batch, letters)."""
    widths = (24 * CONTEXT, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN)
    hidden = [layer for width in widths for layer in (nn.Linear(*width), nn.ReLU())]
    return nn.Sequential(nn.Embedding(letters, 24), nn.Flatten(), *hidden, nn.Linear(HIDDEN, letters))


def generate(model, ids, count):
    """Append the likeliest letters."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids[:, -CONTEXT:]).argmax(-1, keepdim=True)), 1)
    return ids


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--text", type=pathlib.Path, help="a text file; else a file of regimewrap")
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()
text = (options.text or pathlib.Path(regimewrap.__file__).with_name("wrap.py")).read_text()
letters = sorted(set(text))
index = {letter: place for place, letter in enumerate(letters)}
windows = torch.tensor([index[letter] for letter in text]).unfold(0, CONTEXT + 1, 1)
train, test = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :]

torch.manual_seed(0)
model = regimewrap.wrap(character_lm(len(letters)))
cycler, optimizer = regimewrap.RegimeCycler(model), torch.optim.AdamW(model.parameters(), 1e-3)
for _ in range(options.steps):
    batch = train[torch.randint(len(train), (64,))]
    loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    cycler.step(loss)

model.eval()
start = test[:1, :CONTEXT]
print("keep ratio   nats  tokens/s")
with torch.inference_mode(), regimewrap.serve(model, 0.1, example_inputs=start) as served:
    for ratio in (1.0, 0.2, 0.1, 0.05):
        served.keep_ratio = ratio
        nats = F.cross_entropy(model(test[:, :-1]), test[:, -1])
        generate(model, start, 20)  # layers choose in their first calls
        began = time.perf_counter()
        generate(model, start, 200)
        print(f"{ratio:>10}  {nats:5.3f}  {200 / (time.perf_counter() - began):8.0f}")
