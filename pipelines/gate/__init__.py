"""The verdict: policy, statistics, judgement. Needs the base install only."""
