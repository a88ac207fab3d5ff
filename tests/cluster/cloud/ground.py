"""What infra/terraform makes and cluster/aws.yaml builds upon, as far as the launcher asks for it: network, launch templates."""

import boto3

ec2, iam = boto3.client("ec2"), boto3.client("iam")
vpc = ec2.create_vpc(CidrBlock="10.42.0.0/16")["Vpc"]["VpcId"]
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.42.0.0/20")["Subnet"]["SubnetId"]
group = ec2.create_security_group(GroupName="mmdistill-nodes", Description="nodes", VpcId=vpc)["GroupId"]
among = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=among)
image = ec2.describe_images()["Images"][0]["ImageId"]
interface = {"DeviceIndex": 0, "SubnetId": subnet, "Groups": [group], "AssociatePublicIpAddress": False}
for kind in ("head", "worker"):
    name = f"mmdistill-{kind}"
    iam.create_instance_profile(InstanceProfileName=name)
    data = {"ImageId": image, "IamInstanceProfile": {"Name": name}, "NetworkInterfaces": [interface]}
    ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)
