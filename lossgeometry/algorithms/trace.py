"""Trace, diagonal and Frobenius norm of a symmetric operator from products with random vectors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lossgeometry.algorithms.eigensolver import SymmetricOperator
from lossgeometry.algorithms.estimate import Estimate, NormEstimate, effective_degrees
from lossgeometry.errors import InputError
from lossgeometry.symmetry import require_symmetric

Method = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]
WITNESSES = 4  # vectors that are kept where only their symmetry is asked for


def dot_columns(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of corresponding columns, float64."""
    return (a.double() * b.double()).sum(0)


def trace(
    A: SymmetricOperator, *, matvecs: int = 99, method: Method = "hutch++", seed: int = 0
) -> Estimate[float]:
    """Trace of a symmetric operator.

    Parameters
    ----------
    A
        Any object with ``shape``, ``dtype``, ``device`` and ``A @ V`` for (P, k) tensors.
    matvecs
        Most products with `A`; how many were made is in the result. P or more give the exact trace,
        from the P unit vectors.
    method
        "hutchinson" (Girard 1989, Hutchinson 1989): the mean of z·Az over random z; the standard
        error falls as 1 / sqrt(matvecs). "hutch++" (Meyer, Musco, Musco and Woodruff 2021,
        algorithm 1): a third of the products finds the range of `A` roughly, a third is its exact
        trace there, and a third is Hutchinson's on the rest; better where few eigenvalues are
        large. "xtrace" (Epperly, Tropp and Webber 2024, section 2.1): every vector is left out in
        turn of the range and used on the rest; better still, with (P, 2 matvecs) numbers of memory.
    seed
        Of the random vectors.

    Returns
    -------
    Estimate
        In the units of the eigenvalues. That the products themselves are rounded is in its
        ``systematic_error`` as far as independent rounding in the precision of `A` goes.

    Raises
    ------
    InputError
        If the method is unknown, too few products are allowed for a standard error (2 for
        "hutchinson", 6 for "hutch++", 4 for "xtrace"), or `A` is not symmetric.

    See Also
    --------
    diagonal : its terms one by one.
    spectral_density : how the eigenvalues are distributed.

    Notes
    -----
    All random vectors z lie on the sphere of radius sqrt(P), so that errors depend on nothing but
    the eigenvalues. There, of any symmetric B of size N,

        Var(z·Bz) = 2 E |Bz - ρz|²,  ρ = z·Bz / N,

    since E |Bz|² = |B|² (Frobenius) and E (z·Bz)² = (tr(B)² + 2 |B|²) N / (N + 2). The mean of the
    right-hand side over the vectors varies less than the variance of the samples, which few of them
    hardly tell. Its degrees of freedom, and so Student's quantile, follow from the Gram matrix of
    the Bz by Satterthwaite's approximation (1946).

    In "hutch++", B is what the range leaves of A. In "xtrace" sample i has a B of its own, and the
    samples share the vectors that they are not of, so that they are correlated. Their errors e have
    mean zero over their own vector, whatever the others are. Let δ_ij be how sample i changes when
    vector j is left out of its range: e_i - δ_ij depends on vector i alone of the two, and hence

        E e_i e_j = E δ_ij δ_ji,  Var(mean of e) = Σ_i E e_i² / k² + Σ_{i≠j} E δ_ij δ_ji / k².

    The second sum is estimated by leaving out all pairs, which costs no products, and kept between
    0 and what samples that are all the same would give.

    References
    ----------
    D. A. Girard, A fast 'Monte-Carlo cross-validation' procedure, Numer. Math. 56, 1989.

    M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, Commun. Stat.
    Simul. Comput. 18, 1989.

    R. A. Meyer, C. Musco, C. Musco and D. P. Woodruff, Hutch++: optimal stochastic trace
    estimation, SOSA 2021.

    E. N. Epperly, J. A. Tropp and R. J. Webber, XTrace: making the most of every sample in
    stochastic trace estimation, SIAM J. Matrix Anal. Appl. 45, 2024.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import trace
    >>> T = trace(torch.diag(torch.linspace(0, 1, 200)), matvecs=30)
    >>> low, high = T.interval()
    >>> low < 100 < high
    True
    """
    _require_method(method, get_args(Method))
    _require(matvecs, {"hutchinson": 2, "hutch++": 6, "xtrace": 4}[method])
    P = A.shape[0]
    if matvecs >= P:
        matrix = _matrix(A)
        exact = float(matrix.diagonal().double().sum())
        return Estimate(exact, 0.0, math.inf, _rounding(A, matrix), P)
    if method == "hutch++":
        return _hutch_plus_plus(A, matvecs, seed)
    if method == "xtrace":
        return _xtrace(A, matvecs // 2, seed)
    z = _sphere(A, matvecs, seed)
    return _mean_form(A, z, _times(A, z, random=True), P, matvecs)


def diagonal(
    A: SymmetricOperator,
    *,
    matvecs: int = 100,
    method: DiagonalMethod = "hutchinson",
    seed: int = 0,
) -> Estimate[Tensor]:
    """Diagonal of a symmetric operator, (P,) float64.

    Parameters
    ----------
    A, seed
        As of `trace`.
    matvecs
        Most products with `A`; how many were made is in the result. P or more give the exact
        diagonal with "xdiag"; "hutchinson" is never exact.
    method
        "hutchinson" (Bekas, Kokiopoulou and Saad 2007): the mean of z * Az over random signs z, in
        the memory of a few vectors; the standard error of entry i is sqrt(the sum of squares of the
        rest of row i / matvecs). "xdiag" (Epperly, Tropp and Webber 2024, section 2.3): every
        vector is left out in turn of the range of `A` and used on the rest; better where few
        eigenvalues are large, with a few times (P, matvecs) numbers of memory.

    Returns
    -------
    Estimate
        In the units of the eigenvalues.

    Raises
    ------
    InputError
        If the method is unknown, too few products are allowed for a standard error (2 for
        "hutchinson", 4 for "xdiag"), or `A` is not symmetric.

    See Also
    --------
    trace : the sum of it, with a smaller error.

    Notes
    -----
    Samples s of "xdiag" are correlated as those of "xtrace" are; with the δ that are explained at
    `trace`, Var(mean of s) = E var(s) / k + E δ_ij δ_ji, for each entry.

    References
    ----------
    C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Appl. Numer.
    Math. 57, 2007.

    E. N. Epperly, J. A. Tropp and R. J. Webber: see `trace`.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import diagonal
    >>> diagonal(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).estimate
    tensor([1., 2., 3.], dtype=torch.float64)
    """
    _require_method(method, get_args(DiagonalMethod))
    _require(matvecs, {"hutchinson": 2, "xdiag": 4}[method])
    if method == "xdiag":
        return _xdiag(A, matvecs, seed)
    generator = torch.Generator().manual_seed(seed)
    mean, squares = (torch.zeros(A.shape[0], dtype=torch.float64, device=A.device) for _ in "ab")
    witnesses = []
    for i in range(1, matvecs + 1):  # one at a time: any number of vectors in the memory of few
        z = _signs(A, 1, generator)
        Az = A @ z
        if i <= WITNESSES:
            witnesses.append((z, Az))
        sample = (z.double() * Az.double())[:, 0]
        difference = sample - mean
        mean += difference / i
        squares += difference * (sample - mean)
    vectors, products = (torch.cat(columns, dim=1) for columns in zip(*witnesses, strict=True))
    require_symmetric(vectors, products, A.dtype)
    error = (squares / (matvecs - 1) / matvecs).sqrt()
    return Estimate(mean, error, matvecs - 1, 0.0, matvecs)


def frobenius_norm(A: SymmetricOperator, *, matvecs: int = 100, seed: int = 0) -> Estimate[float]:
    """Frobenius norm: the square root of the mean of ``|Az|^2`` over random z, as of `trace`.

    Parameters
    ----------
    A, seed
        As of `trace`.
    matvecs
        Products with `A`.

    Returns
    -------
    Estimate
        In the units of the eigenvalues. Its interval is one of the logarithm, as a norm has no
        sign.

    Raises
    ------
    InputError
        If `matvecs` is less than 2, or if `A` is not symmetric.

    See Also
    --------
    trace : the sum of the eigenvalues; this is the root of that of their squares.

    Notes
    -----
    With ``B = A² - μI`` of trace zero, the variance of ``|Az|²`` is ``2 |B|² P / (P + 2)``, and
    (z·By)² of two vectors has the mean |B|². So has the sum of squares of all products of k of
    them, theirs with themselves included, over (k + 2)(k - 1). The standard error is that of the
    mean, carried through the logarithm. As few as the k squares are enough for it where one
    eigenvalue is all there is, which its degrees of freedom allow for.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import frobenius_norm
    >>> round(frobenius_norm(torch.eye(100)).estimate, 3)
    10.0
    """
    _require(matvecs, 2)
    P, z = A.shape[0], _sphere(A, matvecs, seed)
    Az = _times(A, z, random=True)
    largest = float(Az.abs().max())
    if largest == 0:
        return NormEstimate(0.0, 0.0, matvecs, 0.0, matvecs)
    Az = Az / largest  # squares neither overflow nor vanish
    square = float(dot_columns(Az, Az).mean())
    rest = (Az.T @ Az).double() - square / P * (z.T @ z).double()
    fourth = float(rest.square().sum()) / ((matvecs + 2) * (matvecs - 1))
    variance = 2 * fourth * P / (P + 2) / matvecs
    squared = max(square**2 - variance, fourth)  # |A|⁴, without bias; |B|² is no more
    norm = largest * math.sqrt(square)
    error = norm * math.sqrt(variance / squared) / 2
    return NormEstimate(norm, error, matvecs, _rounding(A, norm), matvecs)


def _hutch_plus_plus(A: SymmetricOperator, matvecs: int, seed: int) -> Estimate[float]:
    k = matvecs // 3
    sketch, z = _sphere(A, matvecs - k, seed).split([k, matvecs - 2 * k], dim=1)
    Q = torch.linalg.qr(_times(A, sketch, random=True)).Q
    AQ = _times(A, Q)
    z = (z - Q @ (Q.T @ z.to(Q.dtype))).to(A.dtype)
    Az = _times(A, z)
    rest = _mean_form(A, z, Az - Q @ (Q.T @ Az), A.shape[0] - k, matvecs)
    inside = float(dot_columns(Q, AQ).sum())
    rounding = math.hypot(rest.systematic_error, _rounding(A, AQ))
    return replace(rest, estimate=inside + rest.estimate, systematic_error=rounding)


def _xtrace(A: SymmetricOperator, k: int, seed: int) -> Estimate[float]:
    P = A.shape[0]
    omega = _sphere(A, k, seed)
    Y = _times(A, omega, random=True)
    Q, _, S = _leave_one_out(Y)
    AQ = _times(A, Q)
    omega = omega.to(Q.dtype)
    H, W = (Q.T @ AQ).double(), (Q.T @ omega).double()
    N = P - k + 1
    own = dot_columns(S, W)
    p = (W - S * own).to(Q.dtype)  # Qᵀ times the part of ω_i within the range without it
    z, Az = omega - Q @ p, Y - AQ @ p
    g = (Q.T @ Az).double()
    forms, residuals = _forms(z, Az - Q @ (g - S * dot_columns(S, g)).to(Q.dtype), N)
    SHS = S.T @ H @ S
    samples = H.trace() - SHS.diagonal() + forms

    # Without ω_j, too: orthogonal to S_i, Q s is what the range loses then. Of pairs, j is the row.
    cosine = (S.T @ S).fill_diagonal_(0.0)
    sine = (1 - cosine**2).clamp_min(torch.finfo(torch.float64).eps).sqrt()
    part = (S.T @ W - cosine * own) / sine  # s·W_i
    slope = (S.T @ g - cosine * dot_columns(S, g)) / sine  # s·g_i
    loss = SHS.diagonal()[:, None] - 2 * cosine * SHS + cosine**2 * SHS.diagonal()
    loss = loss / sine**2  # s·Hs
    longer = dot_columns(z, z) + part**2
    form = (dot_columns(z, Az) + 2 * part * slope + part**2 * loss) * (N + 1) / longer
    change = samples - (H.trace() - SHS.diagonal() - loss + form)
    change.fill_diagonal_(0.0)

    alone = 2 * dot_columns(residuals, residuals).mean()
    shared = (change * change.T).sum() / (k * (k - 1))
    variance = (alone + (k - 1) * shared.clamp(min=0).clamp(max=alone)) / k
    return Estimate(
        float(samples.mean()),
        math.sqrt(variance),
        effective_degrees(residuals),
        _rounding(A, AQ),
        2 * k,
    )


def _xdiag(A: SymmetricOperator, matvecs: int, seed: int) -> Estimate[Tensor]:
    if matvecs >= A.shape[0]:
        exact = _matrix(A).diagonal().double()
        return Estimate(exact, torch.zeros_like(exact), math.inf, 0.0, A.shape[0])
    k = matvecs // 2
    omega = _signs(A, k, torch.Generator().manual_seed(seed))
    Q, R, S = _leave_one_out(_times(A, omega, random=True))
    AQ = _times(A, Q)
    omega = omega.to(Q.dtype)
    q, Aq = Q @ S.to(Q.dtype), AQ @ S.to(Q.dtype)  # q_i: what the range has of A ω_i alone
    length = dot_columns(S, R).to(Q.dtype)
    # diag(P A) + ω_i * (I - P) A ω_i with P = Q Qᵀ - q_i q_iᵀ, where (I - Q Qᵀ) A ω_i = 0.
    samples = (q * (omega * length - Aq)).double()
    spread = samples.var(1) / k + _shared(omega, q, Aq, length, S.T @ S).clamp(min=0)
    return Estimate((Q * AQ).double().sum(1) + samples.mean(1), spread.sqrt(), k - 1, 0.0, 2 * k)


def _shared(omega: Tensor, q: Tensor, Aq: Tensor, length: Tensor, cosine: Tensor) -> Tensor:
    """Mean (P,) of ``δ_ij δ_ji`` over the pairs of samples of `_xdiag`."""
    k = q.shape[1]
    total = torch.zeros(len(q), dtype=torch.float64, device=q.device)
    for i in range(1, k):
        c = cosine[i, :i].to(q.dtype)
        s = (1 - c**2).clamp_min(torch.finfo(q.dtype).eps).sqrt()

        def change(here: slice, other: slice, c: Tensor = c, s: Tensor = s) -> Tensor:
            lost, Alost = ((v[:, other] - c * v[:, here]) / s for v in (q, Aq))
            return (lost * (Alost + c / s * length[here] * omega[:, here])).double()

        one, rest = slice(i, i + 1), slice(i)
        total += (change(one, rest) * change(rest, one)).sum(1)
    return total / (k * (k - 1) / 2)


def _leave_one_out(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Y = QR``, and `S`: ``Q Qᵀ - q qᵀ`` with ``q = Q S_i`` projects on `Y` without column i.

    `Q` is (P, k) in the dtype of `Y`; `R` and `S` are (k, k) float64.
    """
    Q, R = torch.linalg.qr(Y)
    R = R.double()
    # Where Y has fewer dimensions than columns, any direction will do for those that it lacks.
    regular = R.clone()
    pivots = regular.diagonal()
    least = torch.finfo(Y.dtype).eps * pivots.abs().max()
    pivots.masked_fill_(pivots.abs() <= least, float(least) or 1.0)
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    S = torch.linalg.solve_triangular(regular, identity, upper=True).T
    return Q, R, S / S.norm(dim=0)


def _mean_form(
    A: SymmetricOperator, z: Tensor, Bz: Tensor, size: int, matvecs: int
) -> Estimate[float]:
    """Trace of a `B` of this `size` from its products with the columns of `z`."""
    forms, residuals = _forms(z, Bz, size)
    n = len(forms)
    variance = 2 * float(dot_columns(residuals, residuals).mean()) / n
    rounding = _rounding(A, Bz) / math.sqrt(n)
    return Estimate(
        float(forms.mean()), math.sqrt(variance), effective_degrees(residuals), rounding, matvecs
    )


def _forms(z: Tensor, Bz: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``z·Bz`` (k,), and ``Bz - ρz`` (P, k), of columns z stretched to the length sqrt(size)."""
    squared = dot_columns(z, z)
    rho = dot_columns(z, Bz) / squared
    residuals = (Bz - rho.to(Bz.dtype) * z) * (size / squared).sqrt().to(Bz.dtype)
    return size * rho, residuals


def _times(A: SymmetricOperator, V: Tensor, *, random: bool = False) -> Tensor:
    """``A @ V`` for further computation, which QR and sums want to be in float32 at least.

    Of vectors that are `random`, it is asked whether `A` is symmetric.
    """
    AV = (A @ V.to(A.dtype)).to(torch.promote_types(A.dtype, torch.float32))
    if random:
        require_symmetric(V, AV, A.dtype)
    return AV


def _matrix(A: SymmetricOperator) -> Tensor:
    return _times(A, torch.eye(A.shape[0], dtype=A.dtype, device=A.device), random=True)


def _rounding(A: SymmetricOperator, products: Tensor | float) -> float:
    """Of a sum of inner products with the columns (P, k) of `products`."""
    if not isinstance(products, float):
        products = float(torch.linalg.vector_norm(products, dtype=torch.float64))
    return 10 * torch.finfo(A.dtype).eps * products


def _sphere(A: SymmetricOperator, n: int, seed: int) -> Tensor:
    """Random vectors of length sqrt(P), (P, n)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for _ in range(n):
        z = torch.randn(A.shape[0], generator=generator, dtype=torch.float64)
        vectors.append((z * (math.sqrt(len(z)) / z.norm())).to(A.device, A.dtype))
    return torch.stack(vectors).T


def _signs(A: SymmetricOperator, n: int, generator: torch.Generator) -> Tensor:
    """Random signs, (P, n)."""
    bits = torch.randint(2, (A.shape[0], n), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(A.device, A.dtype)


def _require_method(method: str, known: tuple[str, ...]) -> None:
    if method not in known:
        raise InputError(f"method: {method!r}, expected one of {', '.join(known)}")


def _require(matvecs: int, least: int) -> None:
    if matvecs < least:
        raise InputError(f"matvecs: {matvecs}, expected at least {least}")
