# What cluster/aws.yaml launches: two launch templates, known by their names, and what machines made from them may do.

data "aws_ami" "node" {
  count       = var.ami == null ? 1 : 0
  owners      = ["amazon"]
  most_recent = true
  filter {
    name   = "name"
    values = ["Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) *"]
  }
}

data "aws_iam_policy_document" "machine" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

# Without s3:DeleteObjectVersion: what a node overwrites or deletes stays as an old version.
data "aws_iam_policy_document" "data" {
  statement {
    sid       = "Bucket"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.this.arn]
  }
  statement {
    sid       = "Objects"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.this.arn}/*"]
  }
  statement {
    sid       = "Login"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }
  statement {
    sid       = "Pull"
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    resources = [for repository in aws_ecr_repository.this : repository.arn]
  }
}

# The head starts and ends workers: in this network, with the workers' role, and ends or tags none but this cluster's.
data "aws_iam_policy_document" "launch" {
  statement {
    sid       = "Look"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeInstanceStatus", "ec2:DescribeInstanceTypes"]
    resources = ["*"]
  }
  statement {
    sid     = "LaunchHere"
    actions = ["ec2:RunInstances"]
    resources = [
      aws_subnet.private[0].arn,
      aws_security_group.nodes.arn,
      "arn:aws:ec2:${var.region}::image/${local.ami}",
      "arn:aws:ec2:${var.region}:${local.account}:launch-template/*",
      "arn:aws:ec2:${var.region}:${local.account}:network-interface/*",
      "arn:aws:ec2:${var.region}:${local.account}:volume/*",
      "arn:aws:ec2:${var.region}:${local.account}:key-pair/*",
      "arn:aws:ec2:${var.region}:${local.account}:spot-instances-request/*",
    ]
  }
  statement {
    sid       = "LaunchTagged"
    actions   = ["ec2:RunInstances"]
    resources = ["arn:aws:ec2:${var.region}:${local.account}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "TagAtLaunch"
    actions   = ["ec2:CreateTags"]
    resources = ["arn:aws:ec2:${var.region}:${local.account}:*/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }
  statement {
    sid       = "OwnNodes"
    actions   = ["ec2:TerminateInstances", "ec2:StopInstances", "ec2:CreateTags"]
    resources = ["arn:aws:ec2:${var.region}:${local.account}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "WorkersRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.node["worker"].arn]
    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
  statement {
    sid       = "FirstSpotInstance"
    actions   = ["iam:CreateServiceLinkedRole"]
    resources = ["arn:aws:iam::${local.account}:role/aws-service-role/spot.amazonaws.com/*"]
    condition {
      test     = "StringEquals"
      variable = "iam:AWSServiceName"
      values   = ["spot.amazonaws.com"]
    }
  }
}

locals {
  ami   = var.ami == null ? data.aws_ami.node[0].id : var.ami
  nodes = toset(["head", "worker"])
}

resource "aws_iam_role" "node" {
  for_each           = local.nodes
  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.machine.json
}

resource "aws_iam_role_policy" "data" {
  for_each = local.nodes
  name     = "data"
  role     = aws_iam_role.node[each.key].id
  policy   = data.aws_iam_policy_document.data.json
}

resource "aws_iam_role_policy" "launch" {
  name   = "launch"
  role   = aws_iam_role.node["head"].id
  policy = data.aws_iam_policy_document.launch.json
}

# So that people reach the head, without a port open to anybody.
resource "aws_iam_role_policy_attachment" "sessions" {
  role       = aws_iam_role.node["head"].name
  policy_arn = "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "node" {
  for_each = local.nodes
  name     = "${var.name}-${each.key}"
  role     = aws_iam_role.node[each.key].name
}

resource "aws_launch_template" "node" {
  for_each               = local.nodes
  name                   = "${var.name}-${each.key}"
  image_id               = local.ami
  update_default_version = true
  iam_instance_profile {
    name = aws_iam_instance_profile.node[each.key].name
  }
  network_interfaces {
    device_index                = 0
    subnet_id                   = aws_subnet.private[0].id
    security_groups             = [aws_security_group.nodes.id]
    associate_public_ip_address = false
    delete_on_termination       = true
  }
  block_device_mappings {
    device_name = "/dev/sda1"
    ebs {
      volume_size           = var.node_disk
      volume_type           = "gp3"
      encrypted             = true
      delete_on_termination = true
    }
  }
}
