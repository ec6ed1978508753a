"""Models, tensors and runtimes that are wrong: the kernels say what, with the values, and never crash."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import (
    Array,
    Case,
    attention_case,
    embedding_case,
    linear_case,
    needs_library,
    norm_case,
    run_natively,
)

from edgekit.kernels.library import library_path

pytestmark = needs_library


def fed_weights(case: Case, name: str) -> Case:
    """A constant that is an input of the model instead."""
    constants = {key: value for key, value in case.constants.items() if key != name}
    return replace(case, constants=constants, inputs={**case.inputs, name: case.constants[name]})


LINEAR = linear_case(33, 70, offsets="zeros", extra="both")
PLAIN = linear_case(33, 70)
LEAST = linear_case(33, 70, offsets="minima")
NORM = norm_case(33, 70, biased=True)
GATED = norm_case(34, 70, gated=True)
WORDS = embedding_case(33, 70)
SMALL = norm_case(33, 70, bits=3, offsets="minima", scales="int8")
HALF = linear_case(33, 96, bits=6, block=16)
SMALL_TABLE = embedding_case(33, 70, bits=5, scales="int8")
ATTEND = attention_case(tokens=3, first=5, kv_heads=2, group=3, head_dim=32)
NORMED = attention_case(tokens=3, first=5, kv_heads=2, group=3, head_dim=32, normed=True)


def half(*shape: int) -> Array:
    return np.zeros(shape, np.float16)


def floats(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def places(*values: int) -> Array:
    return np.array(values, np.int32)


def signed(*shape: int) -> Array:
    return np.zeros(shape, np.int8)


def octets(*shape: int, value: int = 0) -> Array:
    return np.full(shape, value, np.uint8)


WRONG: dict[str, tuple[Case, str]] = {
    "x too wide": (LINEAR.changed(x=floats(1, 2, 71)), "last dimension of x must be 70: got 71"),
    "x without dimensions": (LINEAR.changed(x=np.array(3, np.float32)), "last dimension of x must be 70: got 0"),
    "x of seven dimensions": (LINEAR.changed(x=floats(1, 1, 1, 1, 1, 1, 70)), "at most 6 dimensions: got 7"),
    "few codes": (LINEAR.changed(codes=octets(3, 3, 255)), "codes must have 2304 elements: got 2295"),
    "many codes": (LINEAR.changed(codes=octets(3, 3, 257)), "codes must have 2304 elements: got 2313"),
    "many scales": (LINEAR.changed(scales=half(4, 3, 16)), "scales must have 144 elements: got 192"),
    "no codes": (LINEAR.changed(codes=octets(0)), "codes must have 2304 elements: got 0"),
    "few scales": (LINEAR.changed(scales=half(143)), "scales must have 144 elements: got 143"),
    "few zeros": (LINEAR.changed(zeros=octets(143)), r"zeros must be 144 .* got 143"),
    "no zeros": (LINEAR.changed(zeros=octets(0)), r"zeros must be 144 .* got 0"),
    "another single zero": (PLAIN.changed(zeros=octets(1, value=7)), r"a single 8 .* got 1, the first 7"),
    "zeros beside minima": (LEAST.changed(zeros=octets(1, value=8)), r"0 beside minima.* the first 8"),
    "all zeros beside minima": (LEAST.changed(zeros=octets(3, 3, 16)), r"0 beside minima.* got 144"),
    "few minima": (LEAST.changed(minima=half(143)), r"minima must be 144 .* got 143"),
    "a single minimum": (PLAIN.changed(minima=half(1) + 1), r"minima must be 144 .* a single zero"),
    "short bias": (LINEAR.changed(bias=floats(32)), r"bias must be 33 .* got 32"),
    "single bias": (LINEAR.changed(bias=floats(1) + 1), r"bias must be 33 .* a single zero"),
    "short residual": (LINEAR.changed(residual=floats(1, 1, 33)), r"residual must be 66 .* got 33"),
    "wide residual": (LINEAR.changed(residual=floats(1, 2, 34)), r"residual must be 66 .* got 68"),
    "no residual": (LINEAR.changed(residual=floats(0)), r"residual must be 66 .* got 0"),
    "short norm": (NORM.changed(norm=floats(69)), "norm must have 70 elements: got 69"),
    "N of nothing": (LINEAR.changed(N=0), "N must be from 1 to 16777216: got 0"),
    "N below nothing": (LINEAR.changed(N=-5), "N must be from 1 to 16777216: got -5"),
    "N past all": (LINEAR.changed(N=2**62), "N must be from 1 to 16777216: got 4611686018427387904"),
    "N too large": (LINEAR.changed(N=49), r"codes must have 3072 elements: got 2304"),
    "K of nothing": (LINEAR.changed(K=0), "K must be from 1 to 16777216: got 0"),
    "K too large": (LINEAR.changed(K=97), r"codes must have 3072 elements: got 2304"),
    "both at the limit": (LINEAR.changed(N=2**24, K=2**24), r"codes must have 140737488355328 elements: got 2304"),
    "7 bits": (LINEAR.changed(bits=7), "bits must be 2, 3, 4, 5, 6 or 8: got 7"),
    "1 bit": (LINEAR.changed(bits=1), "bits must be from 2 to 8: got 1"),
    "5 bits of 4": (LINEAR.changed(bits=5), "codes must have 2880 elements: got 2304"),
    "3 bits of 4": (LINEAR.changed(bits=3), "codes must have 1728 elements: got 2304"),
    "scales of floats": (LINEAR.changed(scales=floats(3, 3, 16)), "scales must be of element type 10 or 2: got 1"),
    "minima of octets": (LEAST.changed(minima=octets(3, 3, 16)), "minima must be of element type 10 or 3: got 2"),
    "small minima alone": (LEAST.changed(minima=signed(3, 3, 16)), "type 3 do not go with scales of 10"),
    "small scales alone": (LEAST.changed(scales=octets(3, 3, 16)), "type 10 do not go with scales of 2"),
    "small scales, one step": (LINEAR.changed(scales=octets(3, 3, 16)), "steps must be 48 numbers .* got 1"),
    "a step beside halves": (LINEAR.changed(steps=half(1)), "must be a single one: got 1"),
    "steps beside halves": (LINEAR.changed(steps=half(3, 1, 16)), "must be a single one: got 48"),
    "few steps": (SMALL.changed(steps=half(3, 1, 16)), "steps must be 96 numbers .* got 48"),
    "many steps": (SMALL_TABLE.changed(steps=half(3, 2, 16)), "steps must be 48 numbers .* got 96"),
    "few small scales": (SMALL.changed(scales=octets(3, 2, 16)), "scales must have 144 elements: got 96"),
    "few small minima": (SMALL.changed(minima=signed(3, 2, 16)), "minima must be 144 .* got 96"),
    "a single small minimum": (SMALL_TABLE.changed(minima=signed(1) + 1), "minima must be 144 .* a single zero"),
    "block of 48": (LINEAR.changed(block=48), "block must be 32, 64 or 128: got 48"),
    "block of 256": (LINEAR.changed(block=256), "block must be from 16 to 128: got 256"),
    "block of 16 with 4 bits": (LINEAR.changed(block=16), "16 for 6 bits and a K of whole 32: got 16, 4 bits and 70"),
    "block of 16 and half a group": (HALF.changed(K=80), "a K of whole 32: got 16, 6 bits and 80"),
    "block of 16 with zeros": (HALF.changed(zeros=octets(3, 6, 16)), "blocks of 16 must be symmetric"),
    "odd gate": (GATED.changed(N=33), "as many gate rows as up rows: N is 33"),
    "half a gate": (GATED.changed(codes=GATED.constants["codes"][:3]), "codes must have 3072 elements: got 2304"),
    "ids past the end": (WORDS.changed(ids=np.array([[0, 33]])), "ids must be from 0 to 32: got 33"),
    "ids below zero": (WORDS.changed(ids=np.array([[-1, 0]])), "ids must be from 0 to 32: got -1"),
    "ids far away": (WORDS.changed(ids=np.array([2**63 - 1])), "ids must be from 0 to 32: got 9223372036854775807"),
    "ids of six dimensions": (WORDS.changed(ids=np.zeros((1,) * 6, np.int64)), "at most 5 dimensions: got 6"),
    "heads of 24": (ATTEND.changed(head_dim=24), "head_dim must be a multiple of 16: got 24"),
    "heads of 8": (ATTEND.changed(head_dim=8), "head_dim must be from 16 to 1024: got 8"),
    "uneven heads": (ATTEND.changed(num_heads=7), "multiple of kv_num_heads: got 7 and 2"),
    "no heads": (ATTEND.changed(num_heads=0), "num_heads must be from 1 to 1024: got 0"),
    "no key heads": (ATTEND.changed(kv_num_heads=0), "kv_num_heads must be from 1 to 1024: got 0"),
    "window below nothing": (ATTEND.changed(local_window_size=-2), "local_window_size must be .* got -2"),
    "no window": (ATTEND.changed(local_window_size=0), "local_window_size must be -1 or at least 1: got 0"),
    "two sequences": (ATTEND.changed(qkv=floats(2, 3, 320)), r"qkv must .* \(1, tokens, 320\): got \(2, 3, 320\)"),
    "narrow qkv": (ATTEND.changed(qkv=floats(1, 3, 319)), r"qkv must have shape \(1, tokens, 320\): got \(1, 3, 319\)"),
    "flat qkv": (ATTEND.changed(qkv=floats(3, 320)), r"qkv must have shape \(1, tokens, 320\): got \(3, 320\)"),
    "3 key heads": (ATTEND.changed(past_key=half(1, 3, 13, 32)), r"past_key .* 2, length, 32\): got \(1, 3, 13, 32\)"),
    "wide values": (ATTEND.changed(past_value=half(1, 2, 13, 48)), r"past_value .* got \(1, 2, 13, 48\)"),
    "two caches": (ATTEND.changed(past_key=half(2, 2, 13, 32)), r"past_key .* got \(2, 2, 13, 32\)"),
    "flat cache": (ATTEND.changed(past_key=half(2, 13, 32)), r"past_key .* got \(2, 13, 32\)"),
    "uneven caches": (ATTEND.changed(past_value=half(1, 2, 14, 32)), r"past_value .* got \(1, 2, 14, 32\)"),
    "last past the cache": (ATTEND.changed(last=places(13)), "tokens 11 to 13 must lie in the cache of 13"),
    "last before the tokens": (ATTEND.changed(last=places(1)), "tokens -1 to 1 must lie in the cache of 13"),
    "last at the end": (ATTEND.changed(last=places(2**31 - 1)), "to 2147483647 must lie in the cache of 13"),
    "last below zero": (ATTEND.changed(last=places(-(2**31))), "to -2147483648 must lie in the cache of 13"),
    "two lasts": (ATTEND.changed(last=places(7, 7)), "last token must be one number: got 2"),
    "no last": (ATTEND.changed(last=places()), "last token must be one number: got 0"),
    "short cosines": (ATTEND.changed(cos=floats(7, 16)), r"cos must have shape \(at least 8, 16\): got \(7, 16\)"),
    "narrow sines": (ATTEND.changed(sin=floats(8, 15)), r"sin must have shape \(at least 8, 16\): got \(8, 15\)"),
    "short head norm": (NORMED.changed(q_norm=floats(31)), "q_norm must have 32 elements: got 31"),
}  # fmt: skip
for name in ("codes", "scales", "zeros", "minima", "bias"):
    WRONG[f"{name} not constant"] = (fed_weights(LINEAR, name), f"input {name} must be a constant of the model")
for given in (SMALL, SMALL_TABLE):
    WRONG[f"steps of {given.op} not constant"] = (fed_weights(given, "steps"), "steps must be a constant of the model")
WRONG["norm not constant"] = (fed_weights(NORM, "norm"), "input norm must be a constant of the model")
WRONG["head norm not constant"] = (fed_weights(NORMED, "k_norm"), "input k_norm must be a constant of the model")
for case in (LINEAR, GATED, WORDS, NORMED):
    for name in case.attributes:
        WRONG[f"{case.op} without {name}"] = (case.changed(**{name: None}), f"attribute {name} must be given")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_that_says_so(name: str) -> None:
    case, message = WRONG[name]
    with pytest.raises(Exception, match=f"{case.op}: .*{message}"):
        run_natively(case)


OLD_RUNTIME = """
import ctypes, sys
lookup = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
version = ctypes.CFUNCTYPE(ctypes.c_void_p)
make_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)

@make_status
def status(code, text):
    print(code, text.decode())
    return 4321

table = (ctypes.c_void_p * 278)(ctypes.cast(status, ctypes.c_void_p).value)
number = ctypes.create_string_buffer(b"1.17.3")
get_api = lookup(lambda asked: ctypes.addressof(table) if asked <= 17 else None)
get_version = version(lambda: ctypes.addressof(number))
base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version)))
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
register.restype = ctypes.c_void_p
print(register(None, ctypes.byref(base)))
"""


def test_an_onnxruntime_that_is_too_old_is_told_so() -> None:
    """A table of version 17 and below, in a process of its own: the library would keep it."""
    command = [sys.executable, "-c", OLD_RUNTIME, str(library_path())]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"2 .*need onnxruntime 1\.24 or newer.*1\.17\.3.*", said[0])
    assert said[1] == "4321"
