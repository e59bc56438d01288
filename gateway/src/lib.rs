//! The edge: WebSocket and HTTP to gRPC
