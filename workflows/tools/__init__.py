"""Commands outside the pipeline: doctor, deliver, gc, sample."""
