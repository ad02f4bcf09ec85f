"""What training any network needs: optimizers, augmentation, cached views, evaluation and health checks."""
