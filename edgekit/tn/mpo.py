"""Matrix product operators: W as a chain of small tensors, one for each site of its rows and columns.

With out = o_1 ... o_N and in = i_1 ... i_N, W is seen as a tensor of axes (o_k i_k), and N - 1 truncated singular value
decompositions cut it (tensor train; tensorly's, Oseledets 2011). Bonds are c_k; at full bonds the chain is W again.
The error of cutting bond k alone is the tail of singular values there, exactly; of cutting all

    |W - W'|_F^2 <= sum_k tail_k^2,      with equality for two sites.

It stores sum_k c_(k-1) o_k i_k c_k numbers, which is few, but multiplies more than low rank does. For 576 x 576 in two
sites of 24 x 24, storing breaks even at c = 288 and multiplying at c = 12. So `edgekit.tn.cost` mostly has it
contracted to an ordinary matrix before it runs: it saves a download, not time. Site shapes (out, 1), (1, in) are low
rank, which saves both.

The metric of what W reads (`edgekit.tn.whitening`) cannot be cut into sites, so truncation ignores it and `refined`
makes up for that: core by core, least squares in the metric, which never raises the error of the outputs.
Source: CompactifAI, Tomut et al., arXiv 2401.14109, for the use; it does not refine. Not supported: prime dimensions,
for which there is only the one site: `site_shapes` gives None, and the step takes low rank and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgekit.errors import UserError
from edgekit.tn.whitening import Doubles
from edgekit.weight import Dense, Factored, Floats

Sites = tuple[tuple[int, int], ...]
DIRECT = 1024  # unknowns in a row of a core up to which its least squares problem is solved exactly
STEPS = 8  # of conjugate gradients beyond


def balanced(number: int, parts: int) -> tuple[int, ...] | None:
    """`number` as a product of factors of 2 or more, as equal as can be; None where there are not enough primes."""
    if parts == 1:
        return (number,) if number > 1 else None
    target = number ** (1 / parts)
    for factor in sorted((d for d in range(2, number) if number % d == 0), key=lambda d: abs(math.log(d / target))):
        rest = balanced(number // factor, parts - 1)
        if rest is not None:
            return tuple(sorted((factor, *rest)))
    return None


def site_shapes(shape: tuple[int, int], count: int) -> Sites | None:
    """Sites for a matrix (out, in): the large factors of one dimension stand with the small ones of the other.

    None where a dimension has fewer than `count` prime factors.
    """
    rows, columns = balanced(shape[0], count), balanced(shape[1], count)
    if rows is None or columns is None:
        return None
    return tuple(zip(rows, reversed(columns), strict=True))


def full_bonds(sites: Sites) -> tuple[int, ...]:
    """The bonds at which nothing is cut: the smaller product of the two sides."""
    sizes = [o * i for o, i in sites]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def count_numbers(sites: Sites, bonds: Sequence[int]) -> int:
    """Numbers that the cores hold."""
    ends = (1, *bonds, 1)
    return sum(left * o * i * right for left, right, (o, i) in zip(ends[:-1], ends[1:], sites, strict=True))


def bonds_for_share(sites: Sites, share: float) -> tuple[int, ...] | None:
    """The widest bonds, equal but for where fewer are all, whose cores hold at most `share` of W; None for none."""
    whole = share * math.prod(o * i for o, i in sites)
    full, best = full_bonds(sites), None
    low, high = 1, max(full)
    while low <= high:
        middle = (low + high) // 2
        bonds = tuple(min(middle, most) for most in full)
        if count_numbers(sites, bonds) <= whole:
            best, low = bonds, middle + 1
        else:
            high = middle - 1
    return best


def bonds_for_error(W: Floats, sites: Sites, error: float) -> tuple[int, ...]:
    """The smallest bonds that keep |W - W'| <= error |W|, an equal part of it for each bond."""
    values = [schmidt_values(W, sites, bond) for bond in range(1, len(sites))]
    allowed = (error * float(np.linalg.norm(W))) ** 2 / len(values)
    found = []
    for squares in (np.square(part) for part in values):
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        found.append(max(1, int(np.argmax(tails <= allowed + 1e-300))))
    return tuple(found)


def schmidt_values(W: Floats | Doubles, sites: Sites, bond: int) -> Doubles:
    """Singular values of W across the bond behind site `bond`, descending."""
    left = math.prod(o * i for o, i in sites[:bond])
    values = np.linalg.svd(_tensor(W, sites).reshape(left, -1), compute_uv=False)
    return np.asarray(values, np.float64)


def _tensor(W: Floats | Doubles, sites: Sites) -> Doubles:
    """W: (out, in) as (o_1 i_1, ..., o_N i_N), float64."""
    count = len(sites)
    apart = W.astype(np.float64).reshape(*(o for o, _ in sites), *(i for _, i in sites))
    order = [axis for k in range(count) for axis in (k, count + k)]
    return apart.transpose(order).reshape([o * i for o, i in sites])


def decomposed(W: Floats, sites: Sites, bonds: Sequence[int], *, where: str) -> Factored:
    """W: (out, in) as a chain over `sites` with these bonds; all cores but the last are left-orthogonal (canonical).

    Raises UserError: sites that do not multiply to the shape, or bonds above `full_bonds`.
    """
    from tensorly.decomposition import tensor_train

    if (math.prod(o for o, _ in sites), math.prod(i for _, i in sites)) != W.shape or len(sites) < 2:
        raise UserError(f"sites must multiply to the matrix: {where} is {W.shape}, its sites {sites}")
    full = full_bonds(sites)
    if len(bonds) != len(full) or any(not 1 <= bond <= most for bond, most in zip(bonds, full, strict=True)):
        raise UserError(f"bonds of {where} must be from 1 to {full}: got {tuple(bonds)}")
    train = tensor_train(_tensor(W, sites), rank=[1, *bonds, 1])
    return stored([np.asarray(core) for core in train], sites)


def stored(cores: Sequence[Doubles], sites: Sites) -> Factored:
    """Cores (c_(k-1), o_k i_k, c_k), as `edgekit.weight.Factored` keeps them."""
    factors = []
    for core, (o, i) in zip(cores, sites, strict=True):
        matrix = core.reshape(core.shape[0] * o, i * core.shape[-1])
        factors.append(Dense(np.ascontiguousarray(matrix, np.float32)))
    return Factored(tuple(factors), sites)


def cores_of(weight: Factored) -> list[Doubles]:
    """Cores (c_(k-1), o_k, i_k, c_k), float64."""
    ends = (1, *weight.bonds, 1)
    return [
        factor.dense().astype(np.float64).reshape(left, o, i, -1)
        for factor, left, (o, i) in zip(weight.factors, ends[:-1], weight.sites, strict=True)
    ]


def centered(cores: Sequence[Doubles], at: int) -> list[Doubles]:
    """The same chain in canonical form: every core but `at` is orthogonal towards it, so its numbers are W's own."""
    found = list(cores)
    for k in range(at):
        c, o, i, d = found[k].shape
        Q, R = np.linalg.qr(found[k].reshape(-1, d))
        found[k], found[k + 1] = Q.reshape(c, o, i, -1), np.tensordot(R, found[k + 1], 1)
    for k in range(len(found) - 1, at, -1):
        c, o, i, d = found[k].shape
        Q, R = np.linalg.qr(found[k].reshape(c, -1).T)
        found[k], found[k - 1] = Q.T.reshape(-1, o, i, d), np.tensordot(found[k - 1], R.T, 1)
    return found


def refined(weight: Factored, W: Floats, gram: Doubles, *, passes: int = 1) -> Factored:
    """Each core in turn as the least squares solution in the metric `gram` (in, in) of what W: (out, in) reads.

    Cores of at most `DIRECT` unknowns a row are solved for, larger ones brought nearer by `STEPS` conjugate gradients.
    tr((W - W') G (W - W')^T) never rises, to rounding. Source: alternating least squares, Holtz et al. 2012.
    """
    cores = cores_of(weight)
    count, exact = len(cores), W.astype(np.float64)
    for _ in range(passes):
        for at in [*range(count), *range(count - 2, 0, -1)]:
            cores = centered(cores, at)
            cores[at] = _Core(cores, at, exact, gram).better()
    joined = [core.reshape(len(core), -1, core.shape[-1]) for core in cores]
    return stored(joined, weight.sites)


class _Core:
    """Least squares for one core X: (c, o, i, d), all others fixed: W' = sum_cd L[p q c] X[c o i d] R[d r s].

    Rows of W' are (p o r), columns (q i s). Rows o of X are independent and share one normal matrix over (i, c, d).
    """

    def __init__(self, cores: Sequence[Doubles], at: int, W: Doubles, gram: Doubles) -> None:
        left, right = _joined(cores[:at])[0], _joined(cores[at + 1 :])[..., 0]  # (P, Q, c) and (d, R, S)
        (P, Q, _), (_, R, S) = left.shape, right.shape
        self.c, self.o, self.i, self.d = cores[at].shape
        self.sides, self.gram, self.old = (P, R, Q, S), gram, cores[at].transpose(1, 2, 0, 3).reshape(self.o, -1)
        self.flat = np.einsum("pqc,drs->cdprqs", left, right).reshape(self.c * self.d, -1)
        self.aim = self._projected(W @ gram)

    def better(self) -> Doubles:
        direct = self.old.shape[1] <= DIRECT
        new = self._solved() if direct else self._descended()
        core: Doubles = new.reshape(self.o, self.i, self.c, self.d).transpose(2, 0, 1, 3)
        return core

    def _projected(self, M: Doubles) -> Doubles:
        """What a matrix (out, in) is to the core: (o, i c d)."""
        P, R, Q, S = self.sides
        apart = M.reshape(P, self.o, R, Q, self.i, S).transpose(1, 4, 0, 2, 3, 5).reshape(self.o * self.i, -1)
        found: Doubles = (apart @ self.flat.T).reshape(self.o, -1)
        return found

    def _applied(self, X: Doubles) -> Doubles:
        """X: (o, i c d) times the normal matrix, without making it."""
        P, R, Q, S = self.sides
        apart = (X.reshape(self.o * self.i, -1) @ self.flat).reshape(self.o, self.i, P, R, Q, S)
        W = apart.transpose(2, 0, 3, 4, 1, 5).reshape(P * self.o * R, Q * self.i * S)
        return self._projected(W @ self.gram)

    def _solved(self) -> Doubles:
        P, R, Q, S = self.sides
        size = self.c * self.d
        J = self.flat.reshape(size, P * R, Q * S)
        G = self.gram.reshape(Q, self.i, S, Q, self.i, S).transpose(1, 4, 0, 2, 3, 5)
        G = G.reshape(self.i, self.i, Q * S, Q * S)
        normal = np.empty((self.i, size, self.i, size))
        for first in range(self.i):
            for second in range(first, self.i):
                block = (J @ G[first, second]).reshape(size, -1) @ self.flat.T
                normal[first, :, second] = block
                normal[second, :, first] = block.T
        square = normal.reshape(self.i * size, -1)
        ridge = 1e-10 * np.trace(square) / len(square) + 1e-300
        move = np.linalg.solve(square + ridge * np.eye(len(square)), (self.aim - self.old @ square).T).T
        return np.asarray(self.old + move, np.float64)

    def _descended(self) -> Doubles:
        """From the old core on; the squared error falls with every step."""
        X = self.old.copy()
        rest = self.aim - self._applied(X)
        towards, size = rest.copy(), float(np.vdot(rest, rest))
        for _ in range(STEPS):
            if size <= 1e-20 * float(np.vdot(self.aim, self.aim)):
                break
            reached = self._applied(towards)
            step = size / float(np.vdot(towards, reached))
            X += step * towards
            rest -= step * reached
            size, before = float(np.vdot(rest, rest)), size
            towards = rest + (size / before) * towards
        return X


def _joined(cores: Sequence[Doubles]) -> Doubles:
    """A run of cores as one: (c, outs, ins, c'); of none, a single one."""
    if not cores:
        return np.ones((1, 1, 1, 1))
    product = cores[0]
    for core in cores[1:]:
        joined = np.tensordot(product, core, 1).transpose(0, 1, 3, 2, 4, 5)  # (c, outs, o, ins, i, d)
        c, outs, o, ins, i, d = joined.shape
        product = joined.reshape(c, outs * o, ins * i, d)
    return product
