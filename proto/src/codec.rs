//! Codec of all generated clients and servers.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstDecoder;

/// Bytes that each stream reserves for encoding, and again for decoding. tonic's default of 8 KiB
/// is a third of the memory of an idle watch. Below 1 KiB, a `BytesMut` whose slices are in use
/// allocates only what the next message needs, not its original capacity.
const BUFFER_BYTES: usize = 512;
/// Encoded bytes after which a stream adds no more messages to a frame: tonic's default.
const YIELD_THRESHOLD: usize = 32 * 1024;

/// Protobuf codec of `prost` with small buffers that grow to the size of a message.
///
/// `Bytes` fields of a decoded message are slices of the receive buffer, which may contain other
/// messages: copy them before keeping them beyond the call.
#[derive(Debug)]
pub struct SmallBufferCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBufferCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBufferCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ExactEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ExactEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(settings())
    }
}

fn settings() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_THRESHOLD)
}

/// Reserves the encoded size of a message before encoding it.
#[derive(Debug)]
pub struct ExactEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for ExactEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.encoded_len());
        item.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}
