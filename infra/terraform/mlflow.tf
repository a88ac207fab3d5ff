# The tracking server: MLflow with accounts on a machine of its own, PostgreSQL by RDS. Passwords are made on that machine at its
# first start and kept in Secrets Manager: none is in this code nor in Terraform's state.

resource "aws_db_subnet_group" "this" {
  name       = var.name
  subnet_ids = aws_subnet.private[*].id
}

resource "aws_db_instance" "this" {
  identifier                  = var.name
  engine                      = "postgres"
  engine_version              = "16"
  instance_class              = var.database_class
  allocated_storage           = 20
  max_allocated_storage       = 200
  storage_type                = "gp3"
  storage_encrypted           = true
  username                    = "postgres"
  manage_master_user_password = true
  db_subnet_group_name        = aws_db_subnet_group.this.name
  vpc_security_group_ids      = [aws_security_group.database.id]
  publicly_accessible         = false
  backup_retention_period     = 14
  copy_tags_to_snapshot       = true
  deletion_protection         = !var.throw_away
  skip_final_snapshot         = var.throw_away
  final_snapshot_identifier   = "${var.name}-last"
}

# What the machine puts there: {"database": ..., "admin": ..., "session": ...}
resource "aws_secretsmanager_secret" "mlflow" {
  name                    = "${var.name}-mlflow"
  recovery_window_in_days = var.throw_away ? 0 : 7
}

data "aws_iam_policy_document" "mlflow" {
  statement {
    sid       = "Artifacts"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.this.arn}/mlflow/*"]
  }
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
  }
  statement {
    sid       = "OwnPasswords"
    actions   = ["secretsmanager:GetSecretValue", "secretsmanager:PutSecretValue"]
    resources = [aws_secretsmanager_secret.mlflow.arn]
  }
  statement {
    sid       = "DatabasePassword"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = aws_db_instance.this.master_user_secret[*].secret_arn
  }
  statement {
    sid       = "Login"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }
  statement {
    sid       = "Pull"
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    resources = [aws_ecr_repository.this["${var.name}-mlflow"].arn]
  }
}

resource "aws_iam_role" "mlflow" {
  name               = "${var.name}-mlflow"
  assume_role_policy = data.aws_iam_policy_document.machine.json
}

resource "aws_iam_role_policy" "mlflow" {
  name   = "mlflow"
  role   = aws_iam_role.mlflow.id
  policy = data.aws_iam_policy_document.mlflow.json
}

resource "aws_iam_role_policy_attachment" "mlflow_sessions" {
  role       = aws_iam_role.mlflow.name
  policy_arn = "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "mlflow" {
  name = "${var.name}-mlflow"
  role = aws_iam_role.mlflow.name
}

resource "aws_instance" "mlflow" {
  ami                    = local.ami
  instance_type          = var.mlflow_instance
  subnet_id              = aws_subnet.private[0].id
  vpc_security_group_ids = [aws_security_group.mlflow.id]
  iam_instance_profile   = aws_iam_instance_profile.mlflow.name
  user_data = templatefile("${path.module}/mlflow.sh.tftpl", {
    region   = var.region
    registry = split("/", aws_ecr_repository.this["${var.name}-mlflow"].repository_url)[0]
    image    = "${aws_ecr_repository.this["${var.name}-mlflow"].repository_url}:${var.mlflow_image}"
    bucket   = local.bucket
    database = aws_db_instance.this.address
    master   = one(aws_db_instance.this.master_user_secret[*].secret_arn)
    secret   = aws_secretsmanager_secret.mlflow.name
    host     = local.mlflow_host
  })
  user_data_replace_on_change = true
  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 2 # the container is one hop further
  }
  root_block_device {
    volume_size = 80
    volume_type = "gp3"
    encrypted   = true
  }
  tags = { Name = "${var.name}-mlflow" }
  lifecycle {
    ignore_changes = [ami]
  }
}

locals {
  mlflow_host = "mlflow.${var.name}.internal"
}

resource "aws_route53_zone" "inside" {
  name = "${var.name}.internal"
  vpc {
    vpc_id = aws_vpc.this.id
  }
}

resource "aws_route53_record" "mlflow" {
  zone_id = aws_route53_zone.inside.zone_id
  name    = local.mlflow_host
  type    = "A"
  ttl     = 60
  records = [aws_instance.mlflow.private_ip]
}
