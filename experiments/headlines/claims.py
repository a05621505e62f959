"""All claims, by name."""

from experiments.headlines import apr, batch_one, bcn, bkn, enorm, ic, lcw, noise_aware, riemannian
from experiments.headlines.claim import Claim

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM for each in (lcw, batch_one, bcn, enorm, ic, bkn, riemannian, noise_aware, apr)
}
