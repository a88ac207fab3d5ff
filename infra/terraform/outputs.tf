output "bucket" {
  value = "s3://${local.bucket}"
}

output "registry" {
  description = "For infra/docker/build.sh --push."
  value       = split("/", aws_ecr_repository.this[var.name].repository_url)[0]
}

output "tracking_uri" {
  description = "Of MLflow, as the nodes reach it."
  value       = "http://${local.mlflow_host}:5000"
}

output "mlflow_instance" {
  description = "For a session to MLflow's machine, by which its page is seen."
  value       = aws_instance.mlflow.id
}

output "mlflow_secret" {
  description = "Of Secrets Manager: its key `admin` is the password of MLflow's account admin."
  value       = aws_secretsmanager_secret.mlflow.name
}
