"""Networks: a backbone predicts, a Denoiser turns the prediction into x_hat with its schedule; exact ones for tests."""
