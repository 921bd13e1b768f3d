"""Arrow Flight: the service that streams published windows and what has settled since, and its client.

What lives here: nothing but the names of its files, in the order in which a request meets them. A client loads ``client`` alone.

    protocol     the messages of Flight          workers      from the start of ``serve`` to its end (``signals``: told, ``log``: said)
    client       reads, checks, follows          fleet        its processes
    received     what it gets, and the receipt   server       one process: port, threads, drain
                                                 tls          its certificates (``watched``: files read again)

    edge         every call, in and out          auth         who it is for
    limits       how much, how many, how long    session      options in a cookie (``presence``: still there?)
    audit        one line per call               status       errors as gRPC statuses

    service      what each RPC answers           actions      handshake, actions, polling, health
    exchange     many tickets on one call        signing      tickets that were given out
    view         windows and files of a version  plan         a ticket over one view
    segment      what is read of the lake        stream       the messages of a plan
    frames       encoded once, kept on disk      disk         where, and what a full one means
    threads      a pool that nobody waits for

    live         follows the change log          buffer       what is not published, by hour
    turns        of readers that need the log    held         the files of that
    rounds       the newest, encoded once        follow       streams that go on

    incoming     what is uploaded                ipc_size     how large it says it is
    upload       into the change log             metrics      what is counted, and shown
"""
