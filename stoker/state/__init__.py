"""Cluster state: one protocol, two backends (embedded, etcd), one test suite for both."""
