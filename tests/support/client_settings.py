"""librdkafka's settings that the user may set for all clients; producer.config.librdkafka has all others."""

from producer.config.librdkafka import _names

FREE_OF_ALL = _names(
    """
    max.in.flight max.in.flight.requests.per.connection message.copy.max.bytes
    client.id client.rack client.dns.lookup message.max.bytes receive.message.max.bytes metadata.recovery.strategy
    metadata.recovery.rebootstrap.trigger.ms metadata.request.timeout.ms metadata.max.age.ms
    topic.metadata.refresh.interval.ms topic.metadata.refresh.fast.interval.ms topic.metadata.refresh.fast.cnt
    topic.metadata.refresh.sparse topic.metadata.propagation.max.ms debug statistics.interval.ms log_level
    log.thread.name log.connection.close enable.random.seed enable.metrics.push enable.sparse.connections
    socket.timeout.ms socket.blocking.max.ms socket.send.buffer.bytes socket.receive.buffer.bytes
    socket.keepalive.enable socket.nagle.disable socket.max.fails socket.connection.setup.timeout.ms
    broker.address.ttl broker.address.family connections.max.idle.ms reconnect.backoff.jitter.ms reconnect.backoff.ms
    reconnect.backoff.max.ms retry.backoff.ms retry.backoff.max.ms api.version.request.timeout.ms
    broker.version.fallback security.protocol
    ssl.cipher.suites ssl.curves.list ssl.sigalgs.list ssl.key.location ssl.key.password ssl.key.pem
    ssl.certificate.location ssl.certificate.pem ssl.ca.location ssl.ca.pem https.ca.location https.ca.pem
    ssl.ca.certificate.stores ssl.crl.location ssl.keystore.location ssl.keystore.password
    enable.ssl.certificate.verification ssl.endpoint.identification.algorithm
    sasl.mechanism sasl.mechanisms sasl.username sasl.password sasl.kerberos.service.name sasl.kerberos.principal
    sasl.kerberos.keytab sasl.kerberos.min.time.before.relogin
    sasl.oauthbearer.config enable.sasl.oauthbearer.unsecure.jwt sasl.oauthbearer.method sasl.oauthbearer.client.id
    sasl.oauthbearer.client.secret sasl.oauthbearer.client.credentials.client.id
    sasl.oauthbearer.client.credentials.client.secret sasl.oauthbearer.scope sasl.oauthbearer.extensions
    sasl.oauthbearer.token.endpoint.url sasl.oauthbearer.sub.claim.name sasl.oauthbearer.grant.type
    sasl.oauthbearer.assertion.algorithm sasl.oauthbearer.assertion.private.key.file
    sasl.oauthbearer.assertion.private.key.passphrase sasl.oauthbearer.assertion.private.key.pem
    sasl.oauthbearer.assertion.file sasl.oauthbearer.assertion.claim.aud sasl.oauthbearer.assertion.claim.exp.seconds
    sasl.oauthbearer.assertion.claim.iss sasl.oauthbearer.assertion.claim.jti.include
    sasl.oauthbearer.assertion.claim.nbf.seconds sasl.oauthbearer.assertion.claim.sub
    sasl.oauthbearer.assertion.jwt.template.file sasl.oauthbearer.metadata.authentication.type
    """
)
"""librdkafka itself rejects max.in.flight above 5, which would break the order."""
