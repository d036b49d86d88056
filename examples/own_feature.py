"""A feature of one's own: how many accepted steps scored low.

    python train.py --schema agg+,examples.own_feature:doubts --lam 3e-3 --out runs/doubts
    python evaluate.py runs/doubts --import examples.own_feature
    python -m agents export runs/doubts --out doubts-router --import examples.own_feature

Training, the live environment, sessions and the service compute it from the same two lines. `trim_env.features.Feature`
and `rollouts.trees.columns` say what it may be made of.
"""

from rollouts.trees.columns import Fold
from trim_env.features import Feature

low = Fold("low_scores", "score", 0.0, lambda so_far, score: so_far + (score < 0.5))  # over the accepted steps
doubts = Feature("low_scores / max_steps", 0, 1, (low, "max_steps"), lambda count, most: count / most)
