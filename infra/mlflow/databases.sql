-- Beside the database mlflow, which the image makes: the accounts.
CREATE DATABASE mlflow_auth OWNER mlflow;
