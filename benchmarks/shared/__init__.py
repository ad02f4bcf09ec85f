"""What the scripts share: result files and their origin, and the published loop as the baseline of speed."""
