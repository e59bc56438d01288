//! Compiles the schema without `protoc`, and generates the table of method policies.

use std::{
    borrow::Cow, collections::BTreeMap, env, error::Error, fs, path::PathBuf, time::Duration,
};

use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, ExtensionDescriptor, MessageDescriptor, MethodDescriptor,
    ServiceDescriptor, Value,
    prost_types::{self, method_options::IdempotencyLevel},
};

const FILES: [&str; 10] = [
    "streamer/common/v1/common.proto",
    "streamer/common/v1/method_options.proto",
    "streamer/router/v1/router.proto",
    "streamer/progress/v1/progress.proto",
    "streamer/processor/v1/worker.proto",
    "streamer/connections/v1/connections.proto",
    "streamer/admin/v1/admin.proto",
    "streamer/internal/v1/internal.proto",
    "google/longrunning/operations.proto",
    // Error details; included so that clients can decode them through reflection.
    "google/rpc/error_details.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=streamer");
    println!("cargo:rerun-if-changed=google");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;
    let compiled = compiler.file_descriptor_set();

    // Reflection serves the public packages only.
    let mut public = compiled.clone();
    public.file.retain(|file| !file.package().starts_with("streamer.internal"));
    for file in &mut public.file {
        file.source_code_info = None;
    }
    fs::write(out.join("public_descriptor.bin"), prost::Message::encode_to_vec(&public))?;

    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .codec_path("crate::codec::SmallBufferCodec")
        .compile_fds(compiled)?;

    let pool = compiler.descriptor_pool();
    fs::write(out.join("method_policies.rs"), method_policies(&pool)?)?;
    fs::write(out.join("stubs.rs"), stubs(&pool))?;
    Ok(())
}

/// Returns the paths and policies of our methods, sorted by path, as a Rust expression for `method_policy.rs`.
fn method_policies(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let call_policy = pool.get_extension_by_name("streamer.common.v1.call_policy");
    let call_policy = call_policy.ok_or("option call_policy is not declared")?;
    let mut entries = BTreeMap::new();
    for service in pool.services() {
        if !service.package_name().starts_with("streamer.") {
            continue;
        }
        for method in service.methods() {
            let path = path(&method);
            let policy = method_policy(&method, &call_policy);
            let policy = policy.map_err(|error| format!("rpc {path}: {error}"))?;
            entries.insert(path, policy);
        }
    }
    let entries = entries.iter().map(|(path, policy)| format!("    ({path:?}, {policy}),\n"));
    Ok(format!("&[\n{}]\n", entries.collect::<String>()))
}

/// Returns the policy of a method as a Rust expression. prost's own types do not contain extensions.
fn method_policy(
    method: &MethodDescriptor,
    call_policy: &ExtensionDescriptor,
) -> Result<String, Box<dyn Error>> {
    let options = method.options();
    // An absent option has the same value as the explicit IDEMPOTENCY_UNKNOWN.
    if !options.has_field_by_name("idempotency_level") {
        return Err("option idempotency_level is required".into());
    }
    let level = field(&options, "idempotency_level")?;
    let level = IdempotencyLevel::try_from(level.as_enum_number().ok_or("not an enum")?)?;
    let declared = options.get_extension(call_policy);
    let declared = declared.as_message().ok_or("call_policy is not a message")?;
    let flag = |name| field(declared, name)?.as_bool().ok_or(format!("{name} is not a bool"));

    let idempotent =
        level != IdempotencyLevel::IdempotencyUnknown || flag("repeatable_by_services")?;
    let retry_if_unavailable = flag("retry_if_unavailable")?;
    if retry_if_unavailable && !idempotent {
        return Err("retry_if_unavailable requires an idempotent method".into());
    }
    let timeout = if declared.has_field_by_name("timeout") {
        let timeout = field(declared, "timeout")?;
        let timeout = timeout.as_message().ok_or("timeout is not a message")?;
        let timeout = Duration::try_from(timeout.transcode_to::<prost_types::Duration>()?)?;
        let millis = timeout.as_millis();
        if millis == 0 || Duration::from_millis(millis.try_into()?) != timeout {
            return Err("timeout must be a positive number of milliseconds".into());
        }
        format!("Some(Duration::from_millis({millis}))")
    } else {
        "None".into()
    };
    let stream_kind = match field(declared, "stream_kind")?.as_enum_number() {
        Some(0) => "Unspecified",
        Some(1) => "Watch",
        Some(2) => "Session",
        Some(3) => "Transfer",
        _ => return Err("unknown stream_kind".into()),
    };
    if method.is_server_streaming() != (stream_kind != "Unspecified") {
        return Err("stream_kind is required if the response is a stream, and only then".into());
    }
    Ok(format!(
        "MethodPolicy {{ idempotent: {idempotent}, retry_if_unavailable: {retry_if_unavailable}, \
         timeout: {timeout}, stream_kind: StreamKind::{stream_kind} }}"
    ))
}

/// Returns a field of a message, or its default value.
fn field<'a>(message: &'a DynamicMessage, name: &str) -> Result<Cow<'a, Value>, String> {
    message.get_field_by_name(name).ok_or_else(|| format!("{name} is not declared"))
}

/// Returns the stubs and endpoints of our services (see `src/seam.rs`). Services with streams of request messages have
/// none: they are only called over the network.
fn stubs(pool: &DescriptorPool) -> String {
    let services = pool.services().filter(|service| {
        service.package_name().starts_with("streamer.")
            && service.methods().all(|method| !method.is_client_streaming())
    });
    services.map(|service| stub(&service) + &endpoint(&service)).collect()
}

/// Returns the path of the Rust module of a package.
fn module(package: &str) -> String {
    format!("crate::{}", package.trim_start_matches("streamer.").replace('.', "::"))
}

/// Returns the path of the Rust type of a message.
fn rust_type(message: &MessageDescriptor) -> String {
    format!("{}::{}", module(message.package_name()), message.name())
}

fn snake_case(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(letter.to_ascii_lowercase());
    }
    text
}

fn stub(service: &ServiceDescriptor) -> String {
    let (name, module) = (service.name(), module(service.package_name()));
    let client = format!("{module}::{}_client::{name}Client<Channel>", snake_case(name));
    let methods = service.methods().map(|method| {
        let (function, path) = (snake_case(method.name()), path(&method));
        let input = rust_type(&method.input());
        let output = rust_type(&method.output());
        let (call, output, convert) = if method.is_server_streaming() {
            let convert = ".map(|response| response.map(Responses::Remote))";
            ("server_streaming", format!("Responses<{output}>"), convert)
        } else {
            ("unary", output, "")
        };
        format!(
            "    pub async fn {function}(
        &mut self,
        request: impl tonic::IntoRequest<{input}>,
    ) -> Result<Response<{output}>, Status> {{
        match self {{
            Self::Local(local) => local.{call}({path:?}, request.into_request()).await,
            Self::Remote(remote) => remote.{function}(request).await{convert},
        }}
    }}
"
        )
    });
    format!(
        "/// Client of `{full_name}`.
#[derive(Clone, Debug)]
pub enum {name}Stub {{
    /// Of a server in this process.
    Local(LocalStub),
    /// Of servers in different processes.
    Remote({client}),
}}

impl {name}Stub {{
    /// Returns a client that uses the given channel.
    #[must_use]
    pub fn new(channel: Channel) -> Self {{
        match channel {{
            Channel::Local(transport) => Self::Local(LocalStub::new(transport)),
            Channel::Remote(_) => Self::Remote(<{client}>::new(channel)),
        }}
    }}

    /// Sets the maximum size of a received message, in bytes.
    #[must_use]
    pub fn max_decoding_message_size(self, limit: usize) -> Self {{
        match self {{
            Self::Local(mut local) => {{
                local.limits.received = limit;
                Self::Local(local)
            }}
            Self::Remote(remote) => Self::Remote(remote.max_decoding_message_size(limit)),
        }}
    }}

    /// Sets the maximum size of a sent message, in bytes.
    #[must_use]
    pub fn max_encoding_message_size(self, limit: usize) -> Self {{
        match self {{
            Self::Local(mut local) => {{
                local.limits.sent = limit;
                Self::Local(local)
            }}
            Self::Remote(remote) => Self::Remote(remote.max_encoding_message_size(limit)),
        }}
    }}

{methods}}}

",
        full_name = service.full_name(),
        methods = methods.collect::<String>(),
    )
}

fn endpoint(service: &ServiceDescriptor) -> String {
    let (name, module) = (service.name(), module(service.package_name()));
    let server_module = format!("{module}::{}_server", snake_case(name));
    let (server, interface) =
        (format!("{server_module}::{name}Server"), format!("{server_module}::{name}"));
    let methods = service.methods().map(|method| {
        let (function, path) = (snake_case(method.name()), path(&method));
        let call = if method.is_server_streaming() { "server_streaming" } else { "unary" };
        format!(
            "            {path:?} => Box::pin(seam::{call}(request, limits, move |request| async move {{
                T::{function}(&service, request).await
            }})),
"
        )
    });
    format!(
        "/// Server of `{full_name}`, for calls from this process and over the network.
#[derive(Debug)]
pub struct {name}Endpoint<T> {{
    service: std::sync::Arc<T>,
    remote: {server}<T>,
    limits: MessageLimits,
}}

impl<T> Clone for {name}Endpoint<T> {{
    fn clone(&self) -> Self {{
        Self {{ service: self.service.clone(), remote: self.remote.clone(), limits: self.limits }}
    }}
}}

impl<T> {name}Endpoint<T> {{
    /// Returns a server that calls the given implementation.
    pub fn new(service: T) -> Self {{
        let service = std::sync::Arc::new(service);
        let remote = {server}::from_arc(service.clone());
        Self {{ service, remote, limits: MessageLimits::default() }}
    }}

    /// Sets the maximum size of a received message, in bytes.
    #[must_use]
    pub fn max_decoding_message_size(mut self, limit: usize) -> Self {{
        self.limits.received = limit;
        self.remote = self.remote.max_decoding_message_size(limit);
        self
    }}

    /// Sets the maximum size of a sent message, in bytes.
    #[must_use]
    pub fn max_encoding_message_size(mut self, limit: usize) -> Self {{
        self.limits.sent = limit;
        self.remote = self.remote.max_encoding_message_size(limit);
        self
    }}
}}

impl<T> tonic::server::NamedService for {name}Endpoint<T> {{
    const NAME: &'static str = {full_name:?};
}}

impl<T, B> tower::Service<http::Request<B>> for {name}Endpoint<T>
where
    T: {interface},
    B: tonic::codegen::Body + Send + 'static,
    B::Error: Into<tonic::codegen::StdError> + Send + 'static,
{{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {{
        Poll::Ready(Ok(()))
    }}

    fn call(&mut self, request: http::Request<B>) -> Self::Future {{
        if !seam::is_local(&request) {{
            return self.remote.call(request);
        }}
        let (service, limits) = (self.service.clone(), self.limits);
        match request.uri().path() {{
{methods}            // A stub calls only methods of its service.
            _ => Box::pin(std::future::ready(Ok(Status::unimplemented(\"unknown method\").into_http()))),
        }}
    }}
}}

",
        full_name = service.full_name(),
        methods = methods.collect::<String>(),
    )
}

/// Returns the path of a method in HTTP.
fn path(method: &MethodDescriptor) -> String {
    format!("/{}/{}", method.parent_service().full_name(), method.name())
}
