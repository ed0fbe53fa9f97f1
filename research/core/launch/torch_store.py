"""The store at which torch's ranks meet, until its launcher ends it: python torch_store.py ADDRESS PORT."""

import signal
import sys


def main(address, port):
    # The folder of this file has names (words, host) that are not for torch.
    sys.path.pop(0)
    from torch.distributed import TCPStore

    store = TCPStore(address, int(port), is_master=True, wait_for_workers=False)
    while store is not None:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:3])
