"""Who broke the WebSocket's rules again and again: refused at the door for a while, which costs less than to hear him out.

Pure: `now` is passed in. Who is who is the caller's affair: a tenant at an address.

Laws
    Nobody is refused before `MOST` offences within `WITHIN_S`, nor later than `BARRED_S` after the last one.
    No more than `KNOWN` are remembered; above that, whoever offended longest ago is forgotten.
"""

from __future__ import annotations

from collections import deque

MOST = 8  # a client with a fault breaks a rule now and then, a flood 100 times a second (guessed)
WITHIN_S = 10.0
BARRED_S = 30.0
KNOWN = 4096

Who = tuple[str, str]


class Offences:
    def __init__(self) -> None:
        self._times: dict[Who, deque[float]] = {}  # the newest `MOST` of each; who was last is last

    def note(self, who: Who, now: float) -> None:
        times = self._times.pop(who, None)
        times = deque(maxlen=MOST) if times is None else times
        times.append(now)
        self._times[who] = times
        if len(self._times) > KNOWN:
            del self._times[next(iter(self._times))]

    def barred_s(self, who: Who, now: float) -> float:
        """For how long still. 0: come in."""
        times = self._times.get(who)
        if times is None or len(times) < MOST or times[-1] - times[0] > WITHIN_S:
            return 0.0
        return max(0.0, times[-1] + BARRED_S - now)
