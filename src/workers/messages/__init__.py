"""What crosses the wire: raw records, the CloudEvents envelope, the models in and out, and their schemas.

Reading is strict where money is at stake (types, ranges, duplicate keys, NaN) and tolerant where a publisher
may grow (unknown fields). What cannot be read is `Refused` with the reason of its dead letter.
"""
