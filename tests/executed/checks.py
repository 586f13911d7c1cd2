"""What the tests of several kernels ask of a case."""

from __future__ import annotations

import random

import torch
from ptx_machine.triton_gpu import EmulatedGpu, emulated

from .cases import Case, expected_of, inputs_of, run
from .execution import KERNELS, TIMINGS, compiled, execute
from .mutants import mutants


def assert_exact_of_small_integers(case: Case, largest: int) -> None:
    """In a drawn timing. All products and sums are exact then, so that one wrong number shows."""
    inputs = inputs_of(case)
    for tensor in vars(inputs).values():
        tensor.copy_(torch.randint(-largest, largest + 1, tensor.shape))
    with emulated(EmulatedGpu(90, random.choice(list(TIMINGS.values()))), *KERNELS):
        actual = run(case, inputs)
    assert torch.equal(actual.double(), expected_of(case, inputs).truth), case


def assert_found_out_without_waits(case: Case, least: int = 1) -> None:
    """Of a program that lacks all of its waits of a kind; it has at least so many kinds."""
    assert not execute(case).faults
    lacking = [mutant for mutant in mutants(compiled(case)) if mutant.number is None]
    assert len(lacking) >= least
    for mutant in lacking:
        assert execute(case, rewrite=mutant, to_first_fault=True).faults, mutant
