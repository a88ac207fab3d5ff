variable "region" {
  description = "Also to be written into cluster/aws.yaml, if it is another."
  type        = string
  default     = "us-east-1"
}

variable "name" {
  description = "Of the cluster and of all that belongs to it; cluster/aws.yaml knows its launch templates by it."
  type        = string
  default     = "mmdistill"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "Lower-case letters, digits and -, at most 31 of them."
  }
}

variable "zones" {
  description = "Two availability zones. All nodes are in the first: a training does not pay for traffic between zones. Default: the region's first two."
  type        = list(string)
  default     = null
}

variable "bucket" {
  description = "Name of the bucket; default: NAME-ACCOUNT-REGION."
  type        = string
  default     = null
}

variable "ami" {
  description = "Machine image of all nodes: Ubuntu with Docker, NVIDIA's driver and container toolkit, and the SSM agent. Default: the newest Deep Learning Base AMI at the time of apply."
  type        = string
  default     = null
}

variable "node_disk" {
  description = "GiB of each node's disk."
  type        = number
  default     = 200
}

variable "database_class" {
  type    = string
  default = "db.t4g.small"
}

variable "mlflow_instance" {
  type    = string
  default = "t3.medium"
}

variable "mlflow_image" {
  description = "Tag of the image that infra/docker/build.sh pushes for the tracking server."
  type        = string
  default     = "3.17.2"
}

variable "throw_away" {
  description = "True for a trial: `terraform destroy` then deletes the bucket with all that is in it, and the database without a last copy."
  type        = bool
  default     = false
}
