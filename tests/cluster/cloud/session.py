"""`aws ssm start-session ... AWS-StartSSHSession`: standard input and output to a port of an instance, by the instance's id."""

import os
import socket
import sys
import threading

import boto3

words = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
assert words["--document-name"] == "AWS-StartSSHSession"
name, port = words["--target"], int(words["--parameters"].removeprefix("portNumber="))
ec2 = boto3.client("ec2", region_name=words["--region"])
(instance,) = ec2.describe_instances(InstanceIds=[name])["Reservations"][0]["Instances"]
connection = socket.create_connection((instance["PrivateIpAddress"], port), timeout=10)
connection.settimeout(None)


def send() -> None:
    while data := os.read(0, 65536):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


threading.Thread(target=send, daemon=True).start()
while data := connection.recv(65536):
    os.write(1, data)
