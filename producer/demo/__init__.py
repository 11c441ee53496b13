"""`rebpf demo`: lossy traffic between two network namespaces, captured live and compared with the kernel's counters."""
