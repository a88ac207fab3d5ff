terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = var.name }
  }
}

data "aws_caller_identity" "this" {}

data "aws_availability_zones" "all" {
  state = "available"
}

locals {
  account = data.aws_caller_identity.this.account_id
  bucket  = coalesce(var.bucket, "${var.name}-${local.account}-${var.region}")
}
