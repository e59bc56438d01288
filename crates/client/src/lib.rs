//! Client library: submit, watch and manage requests over gRPC and WebSocket
