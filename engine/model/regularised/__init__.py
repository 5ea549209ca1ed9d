"""What training does to a model beside its loss: fresh layers, skipped ones, dropout on a schedule."""
