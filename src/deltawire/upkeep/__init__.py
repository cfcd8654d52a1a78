"""Work on a run that no trainer waits for: folds, anchors, pruning, verifying, materializing."""
