//! The services, and which service calls which.

use std::fmt;

/// A service, which can run in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// Serves clients.
    Gateway,
    /// Admits requests.
    Router,
    /// Runs requests.
    Processor,
    /// Serves the event log.
    Progress,
}

/// Whether a service can run without a service that it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The option with the addresses may be empty.
    Optional,
    /// The option with the addresses is required; the caller is ready even if no instance is reachable.
    Configured,
    /// The option with the addresses is required, and the caller is ready only while an instance is
    /// reachable.
    Reachable,
}

/// Calls of one service to another, or to other instances of itself.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Service that is called.
    pub callee: Service,
    /// Whether the caller can run without it.
    pub need: Need,
}

const _: () = {
    let mut index = 0;
    while index < Service::ALL.len() {
        assert!(Service::ALL[index] as usize == index);
        index += 1;
    }
};

impl Service {
    /// All services; each is at the index of its discriminant.
    pub const ALL: [Self; 4] = [Self::Gateway, Self::Router, Self::Processor, Self::Progress];

    /// Returns the services that this service calls. In one process, all services call each other directly.
    #[must_use]
    pub const fn calls(self) -> &'static [Call] {
        match self {
            Self::Gateway => &[
                Call { callee: Self::Gateway, need: Need::Optional },
                Call { callee: Self::Router, need: Need::Reachable },
                // For the streams of workers that connect to the gateway.
                Call { callee: Self::Processor, need: Need::Optional },
                Call { callee: Self::Progress, need: Need::Reachable },
            ],
            Self::Router => &[
                Call { callee: Self::Router, need: Need::Optional },
                // Requests can be stored while no processor is reachable.
                Call { callee: Self::Processor, need: Need::Configured },
                Call { callee: Self::Progress, need: Need::Reachable },
            ],
            Self::Processor => &[Call { callee: Self::Progress, need: Need::Reachable }],
            // An instance forwards watches to the owner of a request, or serves them itself.
            Self::Progress => &[Call { callee: Self::Progress, need: Need::Configured }],
        }
    }

    /// Returns the names of the public gRPC services that this service implements.
    #[must_use]
    pub const fn grpc_services(self) -> &'static [&'static str] {
        match self {
            Self::Gateway => &["streamer.connections.v1.ConnectionsService"],
            Self::Router => &[
                "streamer.router.v1.RouterService",
                "streamer.admin.v1.AdminService",
                "google.longrunning.Operations",
            ],
            Self::Processor => &["streamer.processor.v1.WorkerService"],
            Self::Progress => &["streamer.progress.v1.ProgressService"],
        }
    }

    /// Returns the name of the service's option in the section `peers`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Router => "router",
            Self::Processor => "processor",
            Self::Progress => "progress",
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Progress => formatter.write_str("progress service"),
            Self::Gateway | Self::Router | Self::Processor => formatter.write_str(self.name()),
        }
    }
}
