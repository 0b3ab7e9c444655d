"""Token buckets never let more through than they say, and always let a caller in again after the time they say."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.common.quota import OverQuota, TokenBucket, Usage, Usages
from services.common.settings import Quota


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


RATES = st.floats(0.1, 1000)
WAITS = st.lists(st.floats(0, 5), max_size=50)


@given(RATES, st.floats(1, 100), WAITS, st.floats(0.1, 200))
def test_no_more_than_the_burst_and_the_rate_goes_through(
    rate: float, burst: float, waits: list[float], amount: float
) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    through = 0.0
    for wait in [0.0, *waits]:
        clock.now += wait
        while bucket.take(amount) == 0.0:
            through += amount
        above = max(0.0, amount - burst)  # one that is larger than the burst is paid back afterwards
        assert through <= burst + rate * clock.now + above + 1e-6 * (1 + through)


@given(RATES, st.floats(1, 100), st.floats(0.1, 200))
def test_after_the_seconds_it_says_there_is_room_and_before_there_is_none(
    rate: float, burst: float, amount: float
) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    while (wait := bucket.take(amount)) == 0.0:
        pass
    assume(wait > 1e-6)
    clock.now += 0.9 * wait
    left = bucket.take(amount)
    assert left == pytest.approx(0.1 * wait, rel=1e-3, abs=1e-9)
    clock.now += left * 1.000001 + 1e-9
    assert bucket.take(amount) == 0.0


def test_a_refused_amount_is_not_taken() -> None:
    clock = Clock()
    bucket = TokenBucket(1.0, 2.0, clock)
    assert [bucket.take(2.0), bucket.take(2.0), bucket.take(2.0)] == [0.0, 2.0, 2.0]
    clock.now = 2.0
    assert bucket.take(2.0) == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 0}, "rate: expected a number above 0"),
        ({"rate": float("nan")}, "rate: expected"),
        ({"sessions": -1}, "sessions: expected"),
        ({"burst": 5}, "burst: expected at least 1, beside a rate"),
        ({"rate": 5, "burst": 0.5}, "burst: expected at least 1"),
    ],
)
def test_a_quota_that_means_nothing_is_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Quota(**values)  # type: ignore[arg-type]


def test_each_bound_is_named_and_given_back() -> None:
    usage = Usage("arm", Quota(rate=2, burst=3, bytes_per_s=100, in_flight=1, sessions=1), Clock())
    for context, reason in ((usage.request, "in_flight"), (usage.session, "sessions")):
        with context():
            with pytest.raises(OverQuota) as error, context():
                pass
            assert error.value.reason == reason
        with context():
            pass
    for _ in range(3):
        usage.spend(1, 0)
    with pytest.raises(OverQuota, match=r"arm: expected at most 2 requests a second; ask again in 0\.50 s") as error:
        usage.spend(1, 0)
    assert error.value.fault.to_message()["retry_after_s"] == pytest.approx(0.5)
    assert (error.value.fault.http_status, error.value.fault.http_headers) == (429, {"Retry-After": "1"})
    usage.spend(0, 100)
    with pytest.raises(OverQuota, match="100 bytes a second"):
        usage.spend(0, 50)


def test_usages_of_strangers_who_have_left_do_not_pile_up() -> None:
    clock = Clock()
    usages = Usages(clock)
    quota = Quota(rate=1)
    debtor = usages.of("debtor", quota)
    debtor.spend(1, 0)
    with usages.of("guest", quota).session():
        for number in range(5000):
            usages.of(f"10.0.{number // 256}.{number % 256}", quota)
        assert len(usages) < 2500
        assert usages.of("debtor", quota) is debtor, "leaving pays no debts"
        assert usages.of("guest", quota).sessions == 1
