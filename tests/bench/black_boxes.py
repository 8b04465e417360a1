"""Black boxes in the bench of attribution: their cost beside bare forwards, and the error of Kernel SHAP."""

import statistics

import numpy as np
import torch
from torch import nn

from kernels.attribution import shapley
from pipeline.networks.gradients import Logit
from pipeline.stages.attribute.methods.registry import FUNCTIONS
from pipeline.stages.attribute.options import OPTIONS
from pipeline.stages.attribute.segments import part
from pipeline.stages.attribute.subject import Known, Subject
from tests.bench.timing import seconds

SIZE = 224
COPIES, SEGMENTS = 128, {"kind": "grid", "cells": [6, 7]}
OF_FORWARDS = {"kernel_shap": 1.15, "lime": 1.15, "rise": 1.15}


def black_boxes(network: nn.Module, images: int, rounds: int) -> None:
    """Compare black boxes with bare forwards of the same copies, in passes of so many images."""
    print(f"\nnetwork       method, {COPIES} copies, 42 segments     of bare forwards   allowed")
    inputs, options = torch.randn(2, 3, SIZE, SIZE), {"samples": COPIES, "segments": SEGMENTS}
    index = torch.from_numpy(part(OPTIONS["lime"](**options).segments, inputs.numpy())[0])  # type: ignore[attr-defined]
    batch = torch.randn(images, 3, SIZE, SIZE)
    passes = -(-len(inputs) * (COPIES + 2) // images)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(passes):
                network(batch)

    ratios: dict[str, list[float]] = {}
    for _ in range(max(2, rounds // 2)):
        plain = seconds(bare)
        subject = None
        for method in [*OF_FORWARDS, "rise beside lime"]:
            chosen = OPTIONS[method.partition(" ")[0]](**options)
            if not method.endswith("beside lime") or subject is None:
                target = Logit(torch.tensor([1, 2]))
                parted = {chosen.segments.key: index}  # type: ignore[attr-defined]
                subject = Subject(
                    network, inputs, target, 0 * inputs, images, of_inputs=False, seeds=[0, 1], segments=parted
                )
                assert subject.score.shape == (2,)  # the shared pass
                if method.endswith("beside lime"):
                    FUNCTIONS["lime"](subject, OPTIONS["lime"](**options), Known())
            of = method.partition(" ")[0]
            ratios.setdefault(method, []).append(
                seconds(lambda of=of, subject=subject, chosen=chosen: FUNCTIONS[of](subject, chosen, Known())) / plain
            )
    for method, found in ratios.items():
        allowed = f"{OF_FORWARDS[method]:.2f}" if method in OF_FORWARDS else ""
        print(f"{'resnet18':13} {method:34} {statistics.median(found):12.3f}   {allowed}", flush=True)


def squared_errors(players: int = 42, games: int = 6, turns: int = 4) -> None:
    """Print the squared error of Shapley values at equal forwards, over that of the package shap where it is there.

    Games are sums of 200 coalitions of up to 6 players, each of which pays once all its members are there: the value of
    a player is known.
    """
    try:
        import shap
    except ImportError:
        shap = None
    print(f"\nKernel SHAP of {players} players    squared error   of that of shap   standard error squared")
    for samples in (256, 512, 1024, 2048, 4096):
        ours = theirs = said = 0.0
        for seed in range(games):
            random = np.random.default_rng(seed)
            members = np.zeros((200, players))
            for row in members:
                row[random.choice(players, random.integers(1, 7), replace=False)] = 1
            pay = random.normal(size=200)
            wanted = (pay[:, None] * members / members.sum(1, keepdims=True)).sum(0)

            def game(masks: np.ndarray, members: np.ndarray = members, pay: np.ndarray = pay) -> np.ndarray:
                return ((1.0 - np.asarray(masks, float)) @ members.T == 0) @ pay

            for turn in range(turns):
                drawn = shapley.sample(players, samples, [seed, turn])
                whole = np.concatenate([np.zeros((1, players)), drawn.masks, np.ones((1, players))])
                found = shapley.regression(drawn, game(whole))
                ours += ((found.values - wanted) ** 2).sum()
                said += (found.error**2).sum()
                if shap is not None:
                    np.random.seed(100 * seed + turn)
                    package = shap.KernelExplainer(game, np.zeros((1, players)))
                    values = package.shap_values(np.ones((1, players)), nsamples=samples, l1_reg=False, silent=True)[0]
                    theirs += ((values - wanted) ** 2).sum()
        share = f"{ours / theirs:.3f}" if theirs else "not installed"
        print(f"{samples:6} forwards {ours / games / turns:26.4g} {share:>17} {said / games / turns:24.4g}", flush=True)
