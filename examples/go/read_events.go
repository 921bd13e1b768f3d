// Read the events of a ticket over Arrow Flight and count them.
//
//	go run . grpc://localhost:50051 'events:Order:now-1h:now:10000'
//
// The stream is read batch by batch, so any range fits into memory. Nothing is printed unless all of it arrived.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// summary is what the programs of every language print.
type summary struct {
	rows        int64
	withoutUser int
	dataBytes   int
	first, last time.Time
	byType      map[string]int
}

func (s *summary) add(batch arrow.RecordBatch) {
	column := func(name string) arrow.Array {
		return batch.Column(batch.Schema().FieldIndices(name)[0])
	}
	timestamps := column("timestamp").(*array.Timestamp)
	unit := timestamps.DataType().(*arrow.TimestampType).Unit
	types := column("entity_type").(*array.String)
	data := column("data").(*array.String)

	for row := range int(batch.NumRows()) {
		s.byType[types.Value(row)]++
		s.dataBytes += len(data.Value(row))
	}
	s.withoutUser += column("user_id").NullN()
	if rows := int(batch.NumRows()); rows > 0 {
		// Events come in the order of their timestamps.
		if s.rows == 0 {
			s.first = timestamps.Value(0).ToTime(unit)
		}
		s.last = timestamps.Value(rows - 1).ToTime(unit)
		s.rows += int64(rows)
	}
}

func (s *summary) print() {
	fmt.Printf("rows=%d\nwithout_user=%d\ndata_bytes=%d\n", s.rows, s.withoutUser, s.dataBytes)
	if s.rows > 0 {
		fmt.Printf("first=%s\nlast=%s\n", s.first.Format(time.RFC3339), s.last.Format(time.RFC3339))
	}
	types := make([]string, 0, len(s.byType))
	for name := range s.byType {
		types = append(types, name)
	}
	slices.Sort(types)
	for _, name := range types {
		fmt.Printf("%s=%d\n", name, s.byType[name])
	}
}

func read(url, ticket string) (*summary, error) {
	address, found := strings.CutPrefix(url, "grpc://")
	if !found {
		return nil, fmt.Errorf("the URL must be grpc://host:port, got %q", url)
	}
	client, err := flight.NewClientWithMiddleware(address, nil, nil, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer client.Close()

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := client.DoGet(ctx, &flight.Ticket{Ticket: []byte(ticket)})
	if err != nil {
		return nil, err
	}
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return nil, err
	}
	defer reader.Release()

	events := &summary{byType: map[string]int{}}
	var said []byte
	for reader.Next() {
		events.add(reader.RecordBatch())
		// The last batch has no rows, and a receipt as its metadata.
		said = reader.LatestAppMetadata()
	}
	if err := reader.Err(); err != nil {
		return nil, err
	}
	var receipt struct{ Rows *int64 }
	if json.Unmarshal(said, &receipt) != nil || receipt.Rows == nil || *receipt.Rows != events.rows {
		return nil, fmt.Errorf("the stream does not match its receipt after %d events; read it again", events.rows)
	}
	return events, nil
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: read_events grpc://host:port TICKET")
		os.Exit(2)
	}
	events, err := read(os.Args[1], os.Args[2])
	if err != nil {
		var refused interface{ GRPCStatus() *status.Status }
		if errors.As(err, &refused) {
			err = errors.New(refused.GRPCStatus().Message())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	events.print()
}
