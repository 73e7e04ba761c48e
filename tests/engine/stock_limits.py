"""What steering beside an unmodified llama.cpp cannot do, test by test: the one list of it.

With ``STEER_RUNTIME=stock`` the tests of this folder run on the unpatched twin, but for these.
"""

from __future__ import annotations

ONE_PIECE = "a batch is always computed in one piece (n_ubatch = n_batch), so nothing happens between its parts"
OWN_CALLBACK = "a context has one evaluation callback, and it is taken"
DEVICE = "there are no directions on the device, no nodes in the graph and nothing to reserve"
OTHER_LIBRARY = "the test is about the patched library itself"
REFUSED = "refused with a sentence when a context for two sequences is made: its tokens do not come in the order of the batch"
NO_NODE = "refused with a sentence when the model is opened: its hidden state passes under no name that is known"
_REORDERED = "apertus dream falcon-h1 granitehybrid hrm_text jamba lfm2 lfm2moe llada llada-moe mamba mamba2 rnd1".split()
ONE_BUFFER = "sequences share one buffer, so the beginnings of prompts are not copied between them"

LIMITS: dict[str, str] = {
    "test_architectures.py::test_same_bits_as_the_unpatched_library": OTHER_LIBRARY,
    "test_bench_control.py": OTHER_LIBRARY,
    "test_callbacks.py::test_a_callback_that_raises": ONE_PIECE,
    "test_callbacks.py::test_ranges_changed_in_the_add_callback_count_at_once": ONE_PIECE,
    "test_callbacks.py::test_read_callback_gets_the_rows": ONE_PIECE,
    "test_callbacks.py::test_two_captures_and_a_callback_that_raises_between_them": ONE_PIECE,
    "test_contexts.py::test_out_of_memory_rolls_back": DEVICE,
    "test_errors.py::test_an_untested_architecture_is_refused": OTHER_LIBRARY,
    **{f"test_every_architecture.py::test_formula[{arch}-": REFUSED for arch in _REORDERED},
    "test_every_architecture.py::test_formula[step35-": NO_NODE,
    "test_format_crosscheck.py::test_a_written_control_vector_in_stock_llama_cpp": OTHER_LIBRARY,
    "test_format_crosscheck.py::test_one_layer_reacts_and_it_is_the_same_one": OTHER_LIBRARY,
    "test_graphs.py": DEVICE,
    "test_local_engine.py::test_a_slider_moved_at_every_token": DEVICE,
    "test_reading.py::test_fewer_rows_than_wanted": ONE_PIECE,
    "test_reading.py::test_rows_are_what_the_graph_computes": OWN_CALLBACK,
    "test_responsive.py::test_changes_build_no_graph": DEVICE,
    "test_sharing.py::test_the_beginnings_of_prompts_are_copied": ONE_BUFFER,
    "test_stock.py": OTHER_LIBRARY,
    "test_waiting.py": OTHER_LIBRARY,
}
"""Beginnings of test names, and why."""


def limit_of(nodeid: str) -> str | None:
    """Why a test does not apply, or None."""
    name = nodeid.split("tests/engine/")[-1]
    return next((why for beginning, why in LIMITS.items() if name.startswith(beginning)), None)
