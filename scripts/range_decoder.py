"""The max coder's decoder by docs/artifact-format.md alone, in plain Python: see decode_artifact.py."""

from operator import mul

import numpy as np

TOP, WORD = 3072, (1 << 32) - 1
P = np.arange(4096) + 0.5
STRETCH = np.rint(256 * np.log(P / (4096 - P))).astype(int).tolist()
SQUASH = np.clip(np.rint(65536 / (1 + np.exp(np.arange(TOP, -TOP - 1, -1) / 256))), 2, 65534).astype(int).tolist()
PACES = 240, 40


class Decisions:
    """Decodes bits, each under several contexts whose logits are added up by two sets of learned weights."""

    def __init__(self, data, pace):
        self.data, self.low, self.high, self.pace = iter(data + bytes(4)), 0, WORD, PACES[pace]
        self.code = int.from_bytes([next(self.data) for _ in range(4)], "big")
        self.states = {}  # (kind, predictor, context) -> [probability in 2 ** -21, bits seen]
        starts = [7500] * 32 + [12000] * 16 + [11000] * 12 + [33000]
        self.sets = [[0, [start] * 8] for start in starts]  # decisions so far, weights

    def bit(self, kind, contexts, sets, slowest=400, start=(1 << 20, 0)):
        """One decision, by two sets of weights; `start` is how the first predictor begins in a new context."""
        first = self.states.setdefault((kind, 0, contexts[0]), list(start))[0]
        states = [self.states.setdefault((kind, k, c), [first, 0]) for k, c in enumerate(contexts)]
        logits, sets = [STRETCH[p >> 9] for p, _ in states], [self.sets[k] for k in sets]
        sums = [max(-TOP, min(TOP, sum(map(mul, weights, logits)) >> 16)) for _, weights in sets]
        bit = self.divide(SQUASH[TOP + (sum(sums) >> 1)])
        for used, total in zip(sets, sums, strict=True):
            rate = 16 + self.pace * 600 // (600 + (min(used[0], 16368) & ~15))
            error = rate * (65535 * bit - SQUASH[TOP + total])
            used[0] += 1
            for k, logit in enumerate(logits):
                used[1][k] += error * logit + (1 << 21) >> 22
        for state in states:
            state[0] += (2097120 * bit - state[0]) * (655360 // (10 * state[1] + 24)) >> 16
            state[1] = min(state[1] + 1, slowest)
        return bit

    def divide(self, p):
        """The arithmetic decoder: a bit that is 1 with probability p of 65536."""
        middle = self.low + ((self.high - self.low) * p >> 16)
        bit = int(self.code <= middle)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while (self.low ^ self.high) < 1 << 24:
            self.low, self.high = self.low << 8 & WORD, self.high << 8 & WORD | 255
            self.code = self.code << 8 & WORD | next(self.data, 0)
        return bit


def log(x):
    """24 log2 of x's first twelve bits, rounded down, and 24 for each bit after them."""
    more = max(0, x.bit_length() - 12)
    return ((x >> more) ** 24).bit_length() - 1 + 24 * more


def density(count, of, prior):
    """0 (dense) to 15 (empty)."""
    return max(0, min(15, (log(10 * (of + 20)) - log(10 * count + prior)) >> 4))


def mean(line):
    """0 to 63: the mean magnitude of a row's or a column's levels other than zero."""
    return max(0, min(63, (log(8 * line[1] + 8) - log(8 * line[0] + 4)) // 3))


def sign(x):
    return (x > 0) + 2 * (x < 0)


def levels(data, rows, columns, way=(0, 1, 0), dead=(False, False)):
    """A matrix of levels; `way` is lag, group and pace, `dead` rows and columns are likely to be empty.

    Of each row and each column it keeps three numbers: levels other than zero so far, the sum of their magnitudes,
    the last one's sign.
    """
    prior, (lag, group, pace) = max(1, data[0] if data else 1), way
    coder, out = Decisions(data[1:], pace), np.zeros((rows, columns), int)
    row_lines, column_lines = ([[0, 0, 0] for _ in range(n)] for n in (rows, columns))
    groups = [0] * (columns // group + 1)
    dead_rows, dead_columns = (np.broadcast_to(flags, n) for flags, n in zip(dead, out.shape, strict=True))
    for i in range(rows):
        row, here, above, in_group = row_lines[i], [0] * columns, out[i - 1] if i else np.zeros(columns, int), 0
        for j in range(columns):
            column, in_group = column_lines[j], in_group if j % group else 0
            left, left2 = (here[j - k] if j >= k else 0 for k in (1, 2))
            back, right, corner = (here[j - lag + k] if lag and j >= max(lag, lag - k) else 0 for k in (0, 1, -1))
            a, a2, u, b, b2, b3 = (int(x != 0) for x in (left, left2, above[j], back, right, corner))
            near = [k for k in (j - 1, j + 1, *((j - lag, j + lag) if lag else ())) if 0 <= k < columns]
            r, c = density(row[0], j, prior), density(column[0], i, prior)
            if (dead_rows[i] and not row[0]) or (dead_columns[j] and not column[0]):
                r = c = 15
            n = density(sum(column_lines[k][0] for k in near), (4 if lag else 2) * i, prior)
            g = density(groups[j // group], i * group, prior)
            most = (min(31, row[0]), min(31, column[0]))
            contexts = [(r, c), (r, a, u, b, a2), (c, a, b, b2, a2, b3), j & 8191, i & 8191, most, (n, r, c), (n, r)]
            if group > 1:
                contexts[6:] = (g, n, min(3, in_group)), (min(j % group, 2047), min(3, in_group))
            place = (column[0] == 0) + 2 * (row[0] == 0) + 4 * (i < rows >> 3) + 8 * (j < columns >> 3)
            start = round(min(0.9, max(1e-3, 2.0 ** (-(r + c) / 3))) * (1 << 21)), 1
            around = a + 2 * b + 4 * u + 8 * (c > 8) + 16 * (r > 8)
            if not coder.bit("zero", contexts, (place, around), 500, start):
                continue
            contexts = [0, (sign(left), sign(back)), (row[2], sign(back)), (sign(left), column[2], row[2]), j & 8191]
            plus = coder.bit("sign", contexts, (32 + sign(left), 32 + column[2] * 3 + sign(back)))
            x, y, beside = mean(row), mean(column), min(15, log(abs(left) + abs(back) + 1) // 12)
            bits, more = 0, 1
            while more and bits < 16:
                contexts = [bits, (bits, x), (bits, y), (bits, c, plus), (bits, x + y), (bits, x + y >> 3, beside)]
                more = coder.bit("bits", contexts, (48 + min(7, bits), 48 + min(7, beside)))
                bits += more
            rest = min(1, bits)
            for below in range(bits - 2, -1, -1):
                known = rest if rest < 64 else 0
                rest = 2 * rest + coder.bit("rest", [(bits, known or 64 + below), (bits, known, plus)], (60, 60))
            here[j], in_group, groups[j // group] = (
                (rest + 1) * (1 if plus else -1),
                in_group + 1,
                groups[j // group] + 1,
            )
            for line in (row, column):
                line[:] = line[0] + 1, min(1 << 30, line[1] + rest + 1), 2 - plus
        out[i] = here
    return out
