"""Commands beside the pipeline: doctor, deliver, gc, sample."""
