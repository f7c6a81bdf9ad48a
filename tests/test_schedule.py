"""Learning rate and eps over a stage."""

import pytest

from safer_fast.schedule import Schedule, eps_factor


def test_the_protocol_drops_at_epochs_35_and_38_of_40():
    factor = Schedule().factor
    steps = [round(factor(epoch / 40), 12) for epoch in range(41)]
    assert steps == [1.0] * 35 + [0.1] * 3 + [0.01] * 3
    assert factor(35 / 40 - 1e-9) == 1.0


def test_cosine_constant_and_warmup():
    assert [Schedule("cosine").factor(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert [Schedule("constant").factor(p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [Schedule(warmup_steps=4).rise(s) for s in (-9, -1, 0, 1, 3, 4, 90)] == [1, 1, 0.25, 0.5, 1, 1, 1]
    assert Schedule(warmup_steps=0).rise(0) == 1
    assert Schedule(milestones=(0.5,), gamma=0.3).factor(0.5) == 0.3


def test_eps_is_zero_for_two_thirds_of_the_warm_up_then_rises():
    epochs = [0, 2, 6, 7, 7.5, 8, 9, 20]
    assert [eps_factor(e, 9) for e in epochs] == pytest.approx([0, 0, 0, 1 / 3, 0.5, 2 / 3, 1, 1])
    assert eps_factor(0, 0) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "linear"}, "choose one of step, cosine, constant"),
        ({"milestones": (0.9, 0.5)}, "rising fractions"),
        ({"milestones": (35, 38)}, "fractions of the stage"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Schedule(**options)
