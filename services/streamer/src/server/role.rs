//! The services that a process runs.

use streamer_cluster::Service;

/// Selects the services that a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// All services, which call each other without sockets.
    All,
    /// One service; the others run in other processes.
    Only(Service),
}

impl Role {
    /// Returns whether the process runs the given service.
    pub(crate) fn has(self, service: Service) -> bool {
        self == Self::All || self == Self::Only(service)
    }

    /// Returns the name of the role in traces.
    pub(crate) fn trace_name(self) -> &'static str {
        match self {
            Self::All => "streamer",
            Self::Only(Service::Gateway) => "streamer-gateway",
            Self::Only(Service::Router) => "streamer-router",
            Self::Only(Service::Processor) => "streamer-processor",
            Self::Only(Service::Progress) => "streamer-progress",
        }
    }
}
